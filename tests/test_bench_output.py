"""What the benchmark commands share: results of several runs as one, and outputs that are tried first."""

import argparse
import json

import pytest

from dsmoe import records
from dsmoe.bench import command, inference_command, output, serving_command, sparse_training
from dsmoe.bench.output import give, joined
from dsmoe.errors import UserError, run_reporting_errors

BENCHES = [command, inference_command, serving_command, sparse_training]


def test_rows_are_joined_and_the_rest_is_the_firsts():
    one = {"layers": [{"threads": 1}], "model": {"rows": [1], "k": 8}, "hardware": {"cores": 2}, "rounds": 15}
    two = {"layers": [{"threads": 2}], "model": {"rows": [2], "k": 4}, "hardware": {"cores": 4}, "rounds": 3}
    assert joined([one, two]) == {
        "layers": [{"threads": 1}, {"threads": 2}],
        "model": {"rows": [1, 2], "k": 8},
        "hardware": {"cores": 2},
        "rounds": 15,
    }
    assert joined([one]) == one
    assert joined([{"model": None, "layers": []}, one])["layers"] == [{"threads": 1}]
    # of a part that only one of them has measured nothing is lost, and nothing doubled
    whole = {"model": None, "layers": [{"threads": 1}]}
    assert joined([whole, {**one, "layers": []}]) == {"model": one["model"], "layers": [{"threads": 1}]}


def test_the_command_of_a_record_measures_the_same():
    options = {"record": "r", "only": ["model"], "rounds": 5, "quick": True}
    results = {"layers": [], "model": {"rows": [{"threads": 16}, {"threads": 1}, {"threads": 2}]}}
    assert output.command_for_threads(argparse.Namespace(**options), "bench_inference.py", results) == (
        "python eval/bench_inference.py --threads 1 2 16 --only model --rounds 5 --quick --record r --overwrite"
    )
    options = {"record": "r", "rounds": None, "quick": False}
    results = {"layers": [{"threads": 1}]}
    assert output.command_for_threads(argparse.Namespace(**options), "bench_training.py", results) == (
        "python eval/bench_training.py --threads 1 --record r --overwrite"
    )


@pytest.mark.parametrize("bench", BENCHES)
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no entry"),
        ([1], "written"),
        ({"layers": [1], "rows": [1]}, "written"),
        ({"layers": [{"threads": 1}], "rows": [{"threads": 1}]}, "no entry"),
    ],
)
def test_results_of_something_else_are_one_line(tmp_path, capsys, bench, content, reason):
    file, record = tmp_path / "other.json", tmp_path / "record"
    file.write_text(json.dumps(content))
    assert bench.main(["--results", str(file), "--record", str(record)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --results {file}: not what --json of this benchmark has written")
    assert reason in error and error.count("\n") == 1
    assert not record.exists()


@pytest.mark.parametrize("bench", BENCHES)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--record", "parent", "--overwrite"], "is no record (it holds a folder, record)"),
        (["--record", "parent/record"], "the record exists"),
        (["--record", "file"], "is a file"),
        (["--json", "parent"], "--json parent: is a folder"),
        (["--json", "file/a.json"], "is no folder that can be written to"),
    ],
)
def test_outputs_are_tried_before_anything_is_measured(tmp_path, monkeypatch, capsys, bench, words, message):
    monkeypatch.setattr(bench, "measure", pytest.fail)
    _places(tmp_path, monkeypatch)
    assert bench.main(["--quick", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "message"), [("a.svg", "plots are PNG files"), ("folder.png", "is a folder")]
)
def test_a_plot_is_tried_before_anything_is_measured(tmp_path, monkeypatch, capsys, place, message):
    monkeypatch.setattr(command, "measure", pytest.fail)
    _places(tmp_path, monkeypatch)
    assert command.main(["--quick", "--plot", place]) == 2
    assert message in capsys.readouterr().err


def _places(tmp_path, monkeypatch):
    """A record in a folder, a file, and a folder with the name of a plot, in the current folder."""
    monkeypatch.chdir(tmp_path)
    records.write_record("parent/record", title="t", command="c", conclusion="", files=[])
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()


@pytest.mark.parametrize("failing", ["plot", "record"])
def test_the_table_is_printed_where_the_rest_fails(tmp_path, capsys, monkeypatch, failing):
    """What can't be foreseen, such as a full disk, leaves what was measured on the screen and in --json."""

    def fail(*given, **more):
        raise UserError("the disk is full")

    monkeypatch.setattr(output, "write_record", fail)
    args = argparse.Namespace(json=str(tmp_path / "a.json"), results=None, note="", overwrite=False,
                              record=tmp_path / "record" if failing == "record" else None,
                              plot=tmp_path / "a.png" if failing == "plot" else None)  # fmt: skip
    plots = {"a.png": fail} if failing == "plot" else {}
    assert run_reporting_errors(lambda: give(args, {"rows": [1]}, "THE TABLE", "t", "c", plots)) == 2
    said = capsys.readouterr()
    assert said.out == "THE TABLE\n" and said.err == "error: the disk is full\n"
    assert json.loads((tmp_path / "a.json").read_text()) == {"rows": [1]}
