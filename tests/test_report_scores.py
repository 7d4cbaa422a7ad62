"""Benchmark scores of a study's models: what is scored of each kind, and that nothing is done twice."""

import json
from types import SimpleNamespace

import pytest
import yaml

from dsmoe.files import sha256
from dsmoe.report import scores
from dsmoe.sparsify import command
from dsmoe.study.launcher import identity
from dsmoe.study.spec import StudyRun, read_study

SUMMARY = {"kind": "dense", "seed": 0, "validation_loss": 3.0, "environment": {"corpus": "a text"}}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_study(train, held_out_corpus_dir, tmp_path, capsys, monkeypatch):
    study = {"title": "Toys", "groups": {"dense": {}, "smoe": {}, "dsmoe": {}, "never-trained": {}}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    kinds = {
        "dense": {"model.kind": "dense", "model.num_experts": 1},
        "smoe": {"model.kind": "smoe", "model.mlp_routing": {"policy": "top_k", "k": 1}},
        "dsmoe": {},
    }
    for kind, settings in kinds.items():
        train(f"{kind}-s0", **{"data.path": str(held_out_corpus_dir), "train.total_tokens": 512, **settings})
    words = [str(tmp_path / "toy.yaml"), "--output", str(tmp_path), "--data", str(held_out_corpus_dir), "--share", "0.5",
             "--tasks", "none", "--sequence-length", "16", "--device", "cpu"]  # fmt: skip
    assert scores.main([*words, "--tasks", "piqa", "--include-path", str(tmp_path / "none")]) == 2
    assert "no such folder of tasks" in capsys.readouterr().err
    assert not (tmp_path / "dsmoe-s0" / "sparse-0.5").exists()
    record = tmp_path / "record"
    assert scores.main([*words, "--record", str(record)]) == 0
    dense, smoe, ours = read(tmp_path / "scores.json")["models"]
    assert [one["name"] for one in (dense, smoe, ours)] == ["dense-s0", "smoe-s0", "dsmoe-s0"]
    assert dense["path"].endswith("dense-s0/final") and ours["path"].endswith("dsmoe-s0/sparse-0.5")
    target = read(tmp_path / "dsmoe-s0" / "sparse-0.5" / "sparsity.json")["mlp_active_fraction"]
    assert ours["mlp_active_fraction"] == pytest.approx(target) and target < 1
    text = (record / "README.md").read_text()
    loss = read(tmp_path / "dense-s0" / "summary.json")["test_loss"]
    assert text.startswith("# Toys") and f"dense-s0 {loss:.4f}" in text and "--tasks none" in text
    monkeypatch.setattr(command, "run", None)
    monkeypatch.setattr(scores.score, "score_one", None)
    capsys.readouterr()
    assert scores.main(words) == 0
    assert "already in" in capsys.readouterr().err


def test_a_sparse_model_is_made_anew_from_other_weights_or_text(tmp_path, monkeypatch):
    made = []

    def sparsify(args):
        made.append(args)
        args.output.mkdir(exist_ok=True)
        (args.output / "config.json").touch()

    monkeypatch.setattr(command, "run", sparsify)
    monkeypatch.setattr(scores, "TokenCorpus", lambda path: SimpleNamespace(fingerprint=f"of {path}"))
    final = tmp_path / "dsmoe-s0" / "final"
    final.mkdir(parents=True)
    (tmp_path / "dsmoe-s0" / "summary.json").write_text('{"kind": "dsmoe"}')
    (final / "model.safetensors").write_bytes(b"1")
    run = StudyRun("dsmoe-s0", "dsmoe", {}, 0, {})

    def folder(**more):
        return scores._folder(run, SimpleNamespace(**{"output": tmp_path, "share": 0.5, "data": "a", **more}))

    assert folder() == folder() == tmp_path / "dsmoe-s0" / "sparse-0.5"
    assert len(made) == 1 and made[0].target_active == 0.5
    (final / "model.safetensors").write_bytes(b"2")
    assert folder() == folder() and len(made) == 2 and made[1].overwrite
    assert folder(data="b") == folder(data="b") and len(made) == 3
    (tmp_path / "dsmoe-s0" / "sparse-0.5" / "source.json").unlink()  # an older version made it
    assert folder() and len(made) == 4
    # a mask phase that was steered to the share: with the threshold that it ended with
    summary = {
        "kind": "dsmoe", "mask_phase_threshold": 0.8518515507558231,
        "config": {"model": {"num_experts": 4}, "mask_phase": {"target_active": 0.5}},
    }  # fmt: skip
    (tmp_path / "dsmoe-s0" / "summary.json").write_text(json.dumps(summary))
    assert folder() == folder() and len(made) == 5
    assert (made[4].policy, made[4].threshold, made[4].target_active) == (
        "threshold",
        [0.8518515507558231],
        None,
    )
    assert folder(share=0.25) and made[5].target_active == 0.25


@pytest.mark.parametrize(
    ("inside", "more", "words"),
    [
        ([], [], "no test_loss, which --record needs"),
        (["precious"], ["--overwrite"], "is no record"),
        (["record.json"], [], "--overwrite"),
        ([], ["--conclusion", "no-such.md"], "--conclusion no-such.md: can't be read"),
    ],
)
def test_what_a_record_needs_is_asked_before_scoring(tmp_path, capsys, monkeypatch, inside, more, words):
    monkeypatch.setattr(scores.score, "main", None)
    (tmp_path / "toy.yaml").write_text("groups: {dense: {}}")
    (tmp_path / "dense-s0").mkdir()
    (tmp_path / "dense-s0" / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "record").mkdir()
    for name in inside:
        (tmp_path / "record" / name).touch()
    options = ["--output", str(tmp_path), "--data", "x", "--record", str(tmp_path / "record"), *more]
    assert scores.main([str(tmp_path / "toy.yaml"), *options]) == 2
    assert words in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "record").iterdir()} == set(inside)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"settings": {"train.total_tokens": 512}}, "holds a run of other settings"),
        ({"seed": 1}, "holds a run of seed 1, not 0"),
        ({"environment": {"corpus": "another text"}}, "holds a run of another text"),
    ],
)
def test_runs_of_other_settings_are_not_scored(tmp_path, capsys, monkeypatch, changed, words):
    """A folder's name is not enough: the YAML was edited, or the folder is of another study."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "meta.json").write_text("{}")
    file, run = tmp_path / "toy.yaml", tmp_path / "dense-s0"
    settings = {"data.path": str(text), "train.total_tokens": 1024}
    file.write_text(yaml.safe_dump({"settings": settings, "groups": {"dense": {}}}))
    study = read_study(file)
    begun = identity(study, study.runs[0])
    run.mkdir()
    summary = {**SUMMARY, "environment": {"corpus": sha256(text / "meta.json")}}
    options = [str(file), "--output", str(tmp_path), "--data", str(text)]
    scored = []
    monkeypatch.setattr(scores.score, "checked_settings", lambda args: None)
    monkeypatch.setattr(scores.score, "main", lambda given: scored.append(given) or 0)
    (run / "study.json").write_text(json.dumps(begun))
    (run / "summary.json").write_text(json.dumps(summary))
    assert scores.main(options) == 0 and len(scored) == 1
    begun["settings"] |= changed.get("settings", {})
    (run / "study.json").write_text(json.dumps(begun))
    (run / "summary.json").write_text(json.dumps({**summary, **changed}))
    assert scores.main(options) == 2 and len(scored) == 1
    error = capsys.readouterr().err
    assert f"{run}: {words}" in error and error.count("\n") == 1


def test_bad_input_is_one_line(tmp_path, capsys):
    (tmp_path / "toy.yaml").write_text("groups: {dense: {}}")
    assert scores.main([str(tmp_path / "toy.yaml"), "--output", str(tmp_path), "--data", "x"]) == 2
    error = capsys.readouterr().err
    assert "no finished run" in error and "Traceback" not in error
