"""A run that broke off and was resumed is the run that did not break off, to the bit."""

import errno
import json
import os
import random

import numpy as np
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
    summaries = [run.summary() for run in (whole, resumed)]
    assert summaries[0]["validation_loss"] == summaries[1]["validation_loss"]


def test_a_resumed_run_is_of_the_same_seed(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        broken = train("run", train__save_every_steps=3)
    before = broken.log()
    assert train("run", train__resume=True, train__seeds=[1]).status == 2
    assert "is of seed 0, and train.seeds is 1" in capsys.readouterr().err
    assert broken.log() == before
    assert train("run", train__resume=True).status == 0
    assert train("run", train__resume=True, train__seeds=[1]).status == 2
    assert "its seed is 0 and train.seeds asks for 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"train__total_tokens": 2 * 128}, "has taken 3 steps, and train.total_tokens 256 gives 2"),
        ({"train__global_batch_size": 4}, "train.global_batch_size was 8 and is 4"),
        ({"data__order_seed": 1}, "data.order_seed was 0 and is 1"),
        ({"data__sequence_length": 32}, "data.sequence_length was 16 and is 32"),
        ({"data__weights": {"tiny": 2.0}}, "data.weights.tiny was None and is 2.0"),
        ({"data__first_sample": 8}, "data.first_sample was 0 and is 8"),
    ],
)
def test_what_would_lose_the_place_in_the_text_is_refused(train, monkeypatch, capsys, changed, words):
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        broken = train("run", train__save_every_steps=3)
    before = broken.log()
    assert train("run", train__resume=True, **changed).status == 2
    assert words in capsys.readouterr().err
    assert broken.log() == before and not (broken.folder / "summary.json").exists()
    assert train("run", train__resume=True).status == 0


def test_a_seed_more_keeps_the_one_that_is_there(train, capsys):
    one = train("run", train__total_tokens=3 * 128)
    both = train("run", train__total_tokens=3 * 128, train__seeds=[0, 1], train__resume=True)
    assert both.status == 0
    assert "seed 0 is finished already" in capsys.readouterr().out
    seeds = json.loads((both.folder / "seeds.json").read_text())
    assert seeds["seeds"] == [0, 1]
    # the other way round: one of several is found again
    again = train("run", train__total_tokens=3 * 128, train__seeds=[1], train__resume=True)
    assert again.status == 0 and "seed 1 is finished already" in capsys.readouterr().out
    # without --train.resume nothing is doubled
    assert train("run", train__total_tokens=3 * 128, train__seeds=[0, 1], train__overwrite=True).status == 2
    assert f"{one.folder}: holds a run already, begun with one seed" in capsys.readouterr().err


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


@pytest.mark.parametrize("torn", [b'{"step": 3, "lm_lo', b'{"step": 3, "\xc3', b"\0\0\0\n", b"3\n", b"{}\n"])
def test_a_torn_line_of_the_log_is_dropped(train, monkeypatch, torn):
    settings = {"train__save_every_steps": 3}
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        broken = train("run", **settings)
    with (broken.folder / "log.jsonl").open("ab") as handle:
        handle.write(torn)
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


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over(train, monkeypatch, capsys):
    settings = {"train__save_every_steps": 2}
    whole = train("whole", **settings)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        run = train("run", **settings)
    bad = run.folder / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    flip(bad)
    # the interrupted writing of a third one
    (run.folder / "checkpoints" / ".step-00000006.0123abcd.tmp").mkdir()
    capsys.readouterr()
    assert train("run", **settings, train__resume=True).status == 0
    told = capsys.readouterr()
    assert f"warning: {bad}: changed" in told.err and "resuming step-00000002" in told.out
    assert run.log() == whole.log()
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["latest.json", "step-00000004", "step-00000006"]


def test_a_run_without_an_intact_checkpoint_is_not_started_afresh(train, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        run = train("run", train__save_every_steps=3)
    flip(run.folder / "checkpoints" / "step-00000003" / "model.safetensors")
    before = run.log()
    assert train("run", train__resume=True).status == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        line.startswith("error: ")
        and "no checkpoint is intact" in line
        and "model.safetensors: changed" in line
    )
    assert run.log() == before
    assert train("run").status == 2
    assert train("run", train__resume=True, train__overwrite=True).status == 0
    assert "starting afresh" in capsys.readouterr().err
    assert run.log() == train("whole").log()


@pytest.mark.parametrize("place", ["checkpoint", "log"])
def test_a_full_disk_stops_training_and_costs_nothing(train, monkeypatch, capsys, place):
    settings = {"train__save_every_steps": 2}
    whole = train("whole", **settings)

    def full(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one_step = TrainingRun._one_step

    def filling(self, total):
        if self.step == 3:
            target = (
                "dsmoe.checkpoint.folder.save_file"
                if place == "checkpoint"
                else "dsmoe.trainer.log.json.dumps"
            )
            patch.setattr(target, full)
        return one_step(self, total)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_one_step", filling)
        run = train("run", **settings)
    assert run.status == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and "the disk is full" in line
    assert sorted(path.name for path in (run.folder / "checkpoints").iterdir()) == [
        "latest.json",
        "step-00000002",
    ]
    assert train("run", **settings, train__resume=True).status == 0
    assert run.log() == whole.log()


def test_all_random_states_are_kept(train, monkeypatch):
    """Nothing draws at random today; whatever will is resumed too."""
    drawn = {}
    one_step = TrainingRun._one_step

    def drawing(self, total):
        numbers = [torch.rand(()).item(), random.random(), np.random.random()]  # noqa: NPY002
        assert drawn.setdefault(self.step, numbers) == numbers
        return one_step(self, total)

    monkeypatch.setattr(TrainingRun, "_one_step", drawing)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        assert train("run", train__save_every_steps=3).status == 130
    # what other code draws in between
    torch.rand(7), random.random(), np.random.random(3)  # noqa: NPY002
    assert train("run", train__resume=True).status == 0
    assert sorted(drawn) == list(range(8))


def test_a_finished_run_of_an_older_version_is_known(train):
    """Settings that it did not have count as their defaults."""
    run = train("run")
    summary = run.summary()
    del summary["config"]["guard"], summary["config"]["train"]["precision"]
    (run.folder / "summary.json").write_text(json.dumps(summary))
    assert train("run", train__resume=True).status == 0
    assert train("run", train__resume=True, guard__spike_stds=4.0).status == 2
    assert train("run", train__resume=True, guard__max_total=4).status == 0
