"""A run that broke off and was resumed is the run that did not break off, to the bit."""

import json

import pytest
import torch

from dsmoe.trainer.loop import TrainingRun

RUNS = {
    "exact": {"train__micro_batch_size": 4},
    "running": {"train__micro_batch_size": 4, "router_loss__mi_statistics": "running"},
    "mask_phase": {"mask_phase__fraction": 0.8, "mask_phase__gain": 0.5},
    "smoe": {
        "model__kind": "smoe",
        "model__mlp_routing": {"policy": "top_k", "k": 2},
        "router_loss__load_balancing_coef": 0.1,
        "router_loss__router_z_loss_coef": 0.01,
    },
    "moa": {
        "model__num_attention_experts": 2,
        "model__qk_norm": "per_head",
        "router_loss__router_mi_loss_coef_attention": 0.1,
        "train__gradient_checkpointing": True,
        "router_loss__mi_schedule": "ramp",
        "train__precision": "bf16",
        "optim__schedule": "wsd",
        "data__isolate_documents": True,
    },
}


def interrupt_before(monkeypatch, step, seed=None):
    """Ctrl-C when the run (of a seed) is about to take its step number `step` (from 0)."""
    one_step = TrainingRun._one_step

    def interrupted(self, total):
        if self.step == step and seed in (None, self.seed):
            raise KeyboardInterrupt
        return one_step(self, total)

    monkeypatch.setattr(TrainingRun, "_one_step", interrupted)


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_resumed_equals_uninterrupted(train, monkeypatch, settings, capsys):
    settings = {**settings, "train__save_every_steps": 3}
    whole = train("whole", **settings)
    assert whole.status == 0
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        broken = train("resumed", **settings)
    assert broken.status == 130
    assert len(broken.losses()) == 5
    assert not (broken.folder / "final").exists()
    resumed = train("resumed", **settings, train__resume=True)
    assert resumed.status == 0
    assert "resuming step-00000003" in capsys.readouterr().out
    assert resumed.log() == whole.log()
    assert len(whole.losses()) == 8
    theirs = whole.weights()
    for name, tensor in resumed.weights().items():
        assert torch.equal(tensor, theirs[name]), name
    summaries = [json.loads((run.folder / "summary.json").read_text()) for run in (whole, resumed)]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]


def test_a_run_is_replaced_only_when_asked_to(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        broken = train("run", train__save_every_steps=3)
    before = broken.log()
    assert train("run").status == 2
    assert "--train.overwrite" in capsys.readouterr().err
    assert broken.log() == before
    again, other = train("run", train__overwrite=True), train("other")
    assert again.log() == other.log()


def test_what_an_earlier_run_left_is_not_resumed(train, monkeypatch):
    """A fresh run in an old folder breaks off before and after its first checkpoint."""
    train("run", train__save_every_steps=3)
    settings = {"train__save_every_steps": 2, "train__keep_last": 1, "train__seeds": [1]}
    whole = train("whole", **settings)
    for step in (1, 3):
        with monkeypatch.context() as patch:
            interrupt_before(patch, step)
            assert train("run", **settings, train__overwrite=True).status == 130
        assert train("run", **settings, train__resume=True).log() == whole.log()


def test_a_finished_run_is_left_alone(train, monkeypatch, capsys):
    first = train("run")
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        interrupt_before(patch, 0)
        assert train("run", train__resume=True).status == 0
    assert "seed 0 is finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*") if path.is_file()} == before


def test_unfinished_seeds_are_resumed(train, monkeypatch):
    settings = {"train__seeds": [0, 1], "train__save_every_steps": 3}
    whole = train("whole", **settings)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5, seed=1)
        assert train("run", **settings).status == 130
    resumed = train("run", **settings, train__resume=True)
    assert (resumed.folder / "seeds.json").read_text() == (whole.folder / "seeds.json").read_text()


def test_resume_with_nothing_to_resume(train):
    assert train("a", train__resume=True).log() == train("b").log()


def test_a_torn_line_of_the_log_is_dropped(train, monkeypatch):
    settings = {"train__save_every_steps": 3}
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        broken = train("run", **settings)
    with (broken.folder / "log.jsonl").open("a") as handle:
        handle.write('{"step": 3, "lm_lo')
    assert train("run", **settings, train__resume=True).log() == train("whole", **settings).log()


def test_another_model_is_not_resumed(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        train("run", train__save_every_steps=3)
    capsys.readouterr()
    refused = train("run", train__resume=True, model__hidden_size=64)
    assert refused.status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error:") and "checkpoint of another model" in last


def test_changed_settings_are_told(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        train("run", train__save_every_steps=3)
    assert train("run", train__resume=True, optim__learning_rate=1e-4).status == 0
    assert "and is 0.0001 since step-00000003" in capsys.readouterr().out
    assert train("run", train__resume=True, optim__learning_rate=1e-3).status == 2
    assert "optim.learning_rate was 0.0001 and is 0.001" in capsys.readouterr().err
