"""The sparsity sweep: one command on a tiny model, interrupted and resumed."""

import json
from types import SimpleNamespace

import pytest

from dsmoe.checkpoint.pretrained import save_pretrained
from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError
from dsmoe.report import sparsity
from dsmoe.report.sparsity_table import comparison_rows, tables
from dsmoe.sparsify import sample_corpus, sweep


def test_an_interrupted_sweep_goes_on(tiny_model, held_out_corpus_dir, tmp_path, monkeypatch):
    model = tiny_model(vocab_size=300, router_initializer_range=0.5)
    save_pretrained(model, tmp_path / "model", None)
    words = [str(tmp_path / "model"), "--data", str(held_out_corpus_dir), "--output", str(tmp_path / "sweep")]
    words += ["--shares", "0.25,0.5", "--bounds", "0.01", "--seeds", "0,1", "--sequence-length", "16"]
    words += ["--calibration-tokens", "300", "--held-out-tokens", "300"]
    monkeypatch.setattr(sweep.Judge, "row", _failing_after(sweep.Judge.row, 5))
    assert sparsity.main(words) == 130
    kept = json.loads((tmp_path / "sweep" / "points.json").read_text())["points"]
    assert len(kept) == 5
    monkeypatch.undo()
    measured = []
    row = sweep.Judge.row
    monkeypatch.setattr(sweep.Judge, "row", lambda *args: measured.append(row(*args)) or measured[-1])
    assert sparsity.main(words) == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text())
    points = json.loads((tmp_path / "sweep" / "points.json").read_text())["points"]
    assert {name: points[name] for name in kept} == kept and len(measured) == len(points) - 5
    assert results["calibrated"][0] == [kept[name] for name in list(kept)[:2]]
    families = {(one["family"], one["score"]) for one in results["rows"]}
    assert families == {(family, score) for family, score in sweep.CONTESTANTS}
    for one in results["rows"]:
        if one["family"] == "uniform_k":
            assert one["share"] == one["asked"]
    monkeypatch.setattr(sweep, "calibrate", None)  # nothing is left to measure
    assert sparsity.main(words) == 0
    again = json.loads((tmp_path / "sweep" / "results.json").read_text())
    assert again["rows"] == results["rows"] and again["bounds"] == results["bounds"]
    assert all(row["range_over_samples"] is not None for row in comparison_rows(results))
    results["calibrated"] = results["calibrated"][:1]
    assert all(row["range_over_samples"] is None for row in comparison_rows(results)), (
        "one sample has no range"
    )
    assert "| - |" in " ".join(tables(results).split())


def test_what_is_said_of_a_bound():
    """Within two standard errors of it is one fact, measured below it another; both are said of every bound."""
    increases = {0.01: (0.0104, 0.0001), 0.005: (0.0052, 0.0007), 0.02: (0.0197, 0.0009)}

    def within(bound, family):
        increase, error = increases[bound]
        return {
            "loss_increase": increase / (2 if family else 1), "standard_error": error, "share": 0.25,
        }  # fmt: skip

    found = sweep.sweep_bounds(SimpleNamespace(within=within), list(increases))
    calibrated = [one["calibrated"] for one in found]
    assert [row["holds"] for row in calibrated] == [False, True, True]
    assert [row["below_bound"] for row in calibrated] == [False, False, True]
    assert all(one["uniform_k"]["below_bound"] for one in found)
    text = {"num_tokens": 100, "split": "test"}
    shown = tables({
        "calibrated": [[]], "rows": [], "shares": [], "bounds": found, "reference": {"loss": 3.0},
        "text": {"held_out": text, "calibration": [text]},
    })  # fmt: skip
    assert shown.count("within 2 SE of the bound") == 2 and "holds" not in shown
    assert "(SE) allowed for: 1 of 3 calibrated, 3 of 3 of uniform K." in shown


def _failing_after(function, count):
    calls = []

    def wrapped(*args):
        calls.append(None)
        if len(calls) > count:
            raise KeyboardInterrupt
        return function(*args)

    return wrapped


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shares", "nan"], "--shares: nan is no active share"),
        (["--shares", "0.2,1.5"], "--shares: 1.5 is no active share"),
        (["--bounds", "-1"], "--bounds: -1 is no increase of the loss"),
        (["--seeds", "0,1.5"], "--seeds: 1.5 is no seed"),
        (["--seeds", "-1"], "--seeds: -1 is no seed"),
        ([], "has no MLP experts to choose from"),
        (["--record", "{}", "--overwrite"], "is no record (it holds a folder, model)"),
        (["--record", "{}/new", "--conclusion", "{}/no.md"], "no.md: can't be read"),
    ],
)
def test_refusals(tiny_model, held_out_corpus_dir, tmp_path, capsys, words, told):
    save_pretrained(tiny_model(vocab_size=300, kind="dense", num_experts=1), tmp_path / "model", None)
    options = [
        str(tmp_path / "model"),
        "--data",
        str(held_out_corpus_dir),
        "--output",
        str(tmp_path / "sweep"),
    ]
    assert sparsity.main([*options, *(word.format(tmp_path) for word in words)]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "sweep").exists()


def test_an_output_that_is_a_file_is_refused_first(tiny_model, tmp_path, capsys):
    save_pretrained(tiny_model(vocab_size=300), tmp_path / "model", None)
    (tmp_path / "file").touch()
    words = [str(tmp_path / "model"), "--data", str(tmp_path / "no-text"), "--output", str(tmp_path / "file")]
    assert sparsity.main(words) == 2
    assert "file is no folder that can be written to" in capsys.readouterr().err


def test_models_beside_each_other_have_sweeps_of_their_own(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sparsity, "sweep", lambda model, folder, args: seen.append(args.output) or {"model": 1}
    )
    monkeypatch.setattr(sparsity, "tables", lambda results: seen.append(results["name"]) or "")
    monkeypatch.setattr(sparsity, "give_results", lambda *given: None)
    for name in ("one", "two", "run/final"):
        save_pretrained(tiny_model(vocab_size=300), tmp_path / name, None)
    for name in ("one", "two", "run"):
        assert sparsity.main([str(tmp_path / name), "--data", str(tmp_path)]) == 0
    monkeypatch.chdir(tmp_path / "one")
    assert sparsity.main([".", "--data", str(tmp_path)]) == 0
    assert seen[-2:] == seen[:2]
    del seen[-2:]
    outputs = ("one-sparsity-sweep", "two-sparsity-sweep", "run/sparsity-sweep")
    assert seen == [
        part for name, place in zip(("one", "two", "run"), outputs) for part in (tmp_path / place, name)
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_tokens": 0}, "tokens of a sample: 0; it must be at least 1"),
        ({"sequence_length": 0}, "the sequence length: 0"),
        ({"batch_size": 0}, "the batch size: 0"),
        ({"seed": -1}, "the seed: -1; it must be at least 0"),
    ],
)
def test_samples_that_can_not_be(held_out_corpus_dir, changes, words):
    asked = {"num_tokens": 100, "sequence_length": 16, "batch_size": 4, "seed": 0, **changes}
    with pytest.raises(UserError, match=words):
        sample_corpus(TokenCorpus(held_out_corpus_dir), "test", **asked)
