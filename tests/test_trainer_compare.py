"""`eval/compare_processes.py`: what it launches, what it makes of the logs, what it refuses."""

import json

import pytest

from dsmoe.trainer import compare_processes
from dsmoe.trainer.compare_runs import largest_difference, losses, tokens_per_second


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Launches that train nothing: each run's losses are 2.0, or what `launches.curves` has for its name."""
    seen = []

    def launch(runs, home, *, processes, threads):
        for run in runs:
            settings = dict(zip(run["arguments"][::2], run["arguments"][1::2]))
            folder = home / settings["--train.output_dir"]
            folder.mkdir(exist_ok=True)
            seen.append((folder.name, processes, threads, run["stop_after"], settings))
            rate = 950.0 if processes == 2 else 1000.0
            curve = launch.curves.get(folder.name, [2.0] * 9)
            lines = [{"lm_loss": loss, "tokens_per_second": rate} for loss in curve]
            (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    launch.curves, launch.seen = {}, seen
    monkeypatch.setattr(compare_processes, "launch", launch)
    monkeypatch.setattr(compare_processes, "make_text", lambda home: home / "corpus")
    return launch


def test_all_parts_and_a_record(launches, tmp_path, capsys):
    found = tmp_path / "found.json"
    arguments = ["--steps", "9", "--rounds", "2", "--json", str(found), "--record", str(tmp_path / "record")]
    assert compare_processes.main(arguments) == 0
    results = json.loads(found.read_text())
    assert [(row["strategy"], row["accumulation"]) for row in results["equality"]] == [
        (None, 4),
        *((strategy, steps) for strategy in ("ddp", "fsdp2", "zero2", "zero3") for steps in (1, 4)),
    ]
    assert all(row["largest_relative_difference"] == 0 for row in results["equality"] + results["resume"])
    assert results["speed"]["ratio"] == pytest.approx(0.95)
    cut = [(processes, stop) for name, processes, _, stop, _ in launches.seen if name == "zero3-resumed"]
    assert cut == [(2, 3), (1, 6), (2, None)]
    for name, processes, threads, _, settings in launches.seen:
        accumulation = 4 if name.endswith("-4") else 1
        batch = int(settings["--train.micro_batch_size"]) * processes * accumulation
        assert batch == int(settings["--train.global_batch_size"]), name
        assert threads == (2 // processes if name.startswith("speed") else 1)
        assert settings["--train.float32_matmul"] == ("auto" if name.startswith("speed") else "strict")
    assert "0.950" in capsys.readouterr().out
    assert (tmp_path / "record" / "results.json").exists()


def test_a_difference_is_told(launches, capsys):
    launches.curves["zero2-4"] = [2.0] * 8 + [2.001]
    arguments = ["--only", "equality", "--strategies", "zero2", "--json", "-"]
    assert compare_processes.main(arguments) == 1
    rows = json.loads(capsys.readouterr().out)["equality"]
    assert rows[-1]["largest_relative_difference"] == pytest.approx(5e-4)


def test_curves(tmp_path):
    assert largest_difference([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert largest_difference([1.0], [1.0, 2.0]) == float("inf")
    lines = [{"lm_loss": 1.0, "tokens_per_second": rate} for rate in (1, 100, 300)] + [{"validation_loss": 1}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert losses(tmp_path) == [1.0] * 3
    assert tokens_per_second(tmp_path, 1) == pytest.approx(150)


@pytest.mark.parametrize("words", [["--steps", "2"], ["--rounds", "0"], ["--speed-steps", "0"]])
def test_refusals(words, capsys):
    assert compare_processes.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {words[0]} is {words[1]}")
