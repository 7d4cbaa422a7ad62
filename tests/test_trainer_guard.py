"""Steps that would do harm move no weight, are counted and told, and end training when there are too many."""

import json
import math
import shutil

import pytest
import torch
from accelerate import Accelerator

from dsmoe.config.run import GuardSettings
from dsmoe.trainer.guard import Guard, RunningScale
from dsmoe.trainer.loop import TrainingRun

CLIP = Accelerator.clip_grad_norm_


def poison(monkeypatch, steps, value=math.nan, running=False):
    """The gradient (and the running p(e)) of these steps (from 0) holds `value`."""
    one_step = TrainingRun._one_step

    def poisoned(self, total):
        def clip(accelerator, parameters, *arguments):
            parameters = list(parameters)
            if self.step in steps:
                parameters[0].grad.view(-1)[3] = value
                for mean in self.state.running.means.values() if running else ():
                    mean.fill_(value)
            return CLIP(accelerator, parameters, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "clip_grad_norm_", clip)
            return one_step(self, total)

    monkeypatch.setattr(TrainingRun, "_one_step", poisoned)


def weights_before(monkeypatch):
    """Weights at the beginning of each step, by its number."""
    seen, one_step = {}, TrainingRun._one_step

    def recorded(self, total):
        seen[self.step] = torch.cat([p.detach().flatten() for p in self.raw_model.parameters()])
        return one_step(self, total)

    monkeypatch.setattr(TrainingRun, "_one_step", recorded)
    return seen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_broken_step_is_skipped(train, monkeypatch, value, clip):
    poison(monkeypatch, {2}, value)
    weights = weights_before(monkeypatch)
    run = train("run", optim__grad_clip=clip)
    assert run.status == 0
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[1], weights[2]) and not torch.equal(weights[3], weights[4])
    line = run.log()[2]
    assert (
        line["step"] == 3 and line["skipped"].startswith("gradient norm is ") and line["skipped_total"] == 1
    )
    assert [line["step"] for line in run.log() if "lm_loss" in line] == [1, 2, 4, 5, 6, 7, 8]
    assert all(math.isfinite(loss) for loss in run.losses())
    assert run.summary()["skipped_steps"] == 1
    for tensor in run.weights().values():
        assert tensor.isfinite().all()


def test_without_the_guard_it_would_spread(train, monkeypatch):
    poison(monkeypatch, {2})
    run = train("run", guard__enabled=False)
    assert run.status == 0 and not any("skipped" in line for line in run.log())
    assert not all(math.isfinite(loss) for loss in run.losses())


@pytest.mark.parametrize("extra", [{}, {"mask_phase__fraction": 1.0}])
def test_a_skipped_step_leaves_no_trace(train, monkeypatch, extra):
    """Running p(e) and the mask's threshold are those from before; so is the run that is resumed after it."""
    settings = {
        "router_loss__mi_statistics": "running",
        "train__save_every_steps": 1,
        "train__keep_last": 8,
        **extra,
    }
    poison(monkeypatch, {2}, running=True)
    run = train("run", **settings)
    assert run.status == 0 and all(math.isfinite(loss) for loss in run.losses())
    states = [run.folder / "checkpoints" / f"step-{step:08d}" for step in (2, 3)]
    before, after = (json.loads((path / "state.json").read_text()) for path in states)
    assert before["controller"] == after["controller"]
    assert (before["guard"]["total"], after["guard"]["total"]) == (0, 1)
    extras = [(path / "extra.safetensors").read_bytes() for path in states]
    assert extras[0] == extras[1]
    log = run.log()
    (run.folder / "summary.json").unlink()
    for step in range(4, 8):
        shutil.rmtree(run.folder / "checkpoints" / f"step-{step:08d}")
    assert train("run", **settings, train__resume=True).status == 0
    assert run.log() == log


def test_the_next_step_reads_the_next_text(train, monkeypatch):
    from dsmoe.trainer.step import Stepper

    seen, step = [], Stepper.step

    def recorded(self, micro_batches, *args, **kwargs):
        seen.append(torch.cat([batch["input_ids"] for batch in micro_batches]))
        return step(self, micro_batches, *args, **kwargs)

    monkeypatch.setattr(Stepper, "step", recorded)
    train("plain")
    plain, seen[:] = torch.stack(seen), []
    poison(monkeypatch, {2, 3})
    train("poisoned")
    assert torch.equal(plain, torch.stack(seen))


@pytest.mark.parametrize(
    ("settings", "steps", "stops", "words"),
    [
        (
            {"guard__max_consecutive": 2},
            {1, 3, 4},
            5,
            "2 steps were skipped in a row (guard.max_consecutive)",
        ),
        ({"guard__max_total": 3}, {1, 3, 5, 7}, 6, "3 steps were skipped in total (guard.max_total)"),
    ],
)
def test_too_many_stop_training(train, monkeypatch, capsys, settings, steps, stops, words):
    with monkeypatch.context() as patch:
        poison(patch, steps)
        run = train("run", **settings)
    assert run.status == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        line.startswith("error: ")
        and words in line
        and f"the last at step {stops}: gradient norm is nan" in line
    )
    checkpoint = run.folder / "checkpoints" / f"step-{stops:08d}"
    assert checkpoint.exists() and not (run.folder / "final").exists()
    # what went before is not lost
    assert train("run", train__resume=True).status == 0
    assert [line["step"] for line in run.log() if "skipped" not in line][-1] == 8


def test_a_spike_is_skipped(train, monkeypatch):
    settings = {"guard__spike_stds": 20.0, "guard__spike_window": 4, "train__total_tokens": 10 * 128}
    assert not any("skipped" in line for line in train("calm", **settings).log())
    with monkeypatch.context() as patch:
        poison(patch, {6}, 1e4)
        skipped = [line for line in train("run", **settings).log() if "skipped" in line]
    assert [line["step"] for line in skipped] == [7]
    assert "gradient norm" in skipped[0]["skipped"] and "is a spike" in skipped[0]["skipped"]
    # not before the window is full, and not unless asked for
    poison(monkeypatch, {2}, 1e4)
    assert [line["step"] for line in train("early", **settings).log() if "skipped" in line] == []
    assert not any("skipped" in line for line in train("off").log())


def test_judgement():
    guard = Guard(GuardSettings(spike_stds=3.0, spike_window=50, max_consecutive=3, max_total=5))
    draws = torch.Generator().manual_seed(0)
    noise = (0.1 * torch.randn(200, generator=draws, dtype=torch.float64)).tolist()
    assert sum(guard.judge(4 + value, 1.0) is not None for value in noise) < 10
    guard.total = guard.consecutive = 0
    assert guard.judge(4.0, 1.0) is None
    limit = guard.usual["loss"].limit(3.0)
    assert 4.15 < limit < 4.5
    # a spike does not shift what is usual
    assert "loss 9 is a spike" in guard.judge(9.0, 1.0) and guard.usual["loss"].limit(3.0) == limit
    assert guard.judge(float("nan"), 1.0) == "loss is nan" and guard.exhausted() is None
    assert guard.judge(4.0, float("inf")) == "gradient norm is inf" and "in a row" in guard.exhausted()
    assert guard.judge(4.0, 1.0) is None and guard.consecutive == 0 and guard.exhausted() is None
    guard.judge(9.0, 1.0), guard.judge(9.0, 1.0)
    assert "in total" in guard.exhausted()
    again = Guard(guard.settings)
    again.load(json.loads(json.dumps(guard.state())))
    assert again == guard
    unlimited = Guard(GuardSettings(max_consecutive=0, max_total=0), total=10**6, consecutive=10**6)
    assert unlimited.exhausted() is None


def test_the_mask_phase_has_a_scale_of_its_own():
    """Its loss jumps, and a step that is left out moves nothing that could bring it down."""
    guard = Guard(GuardSettings(spike_stds=6.0, spike_window=10))
    for step in range(40):
        assert guard.judge(2.7 + 0.03 * (step % 2), 1.0 + 0.1 * (step % 2)) is None
    assert guard.judge(3.1, 1.0) is not None
    for step in range(40):
        assert guard.judge(3.1 + 0.03 * (step % 2), 1.0 + 0.1 * (step % 2), masked=True) is None
    assert guard.judge(4.0, 1.0, masked=True).startswith("masked loss 4 is a spike")
    again = Guard(guard.settings)
    again.load(json.loads(json.dumps(guard.state())))
    assert again == guard


def test_the_loop_tells_the_guard_of_the_mask_phase(train, monkeypatch):
    judge, seen = Guard.judge, []

    def recorded(self, loss, grad_norm, masked=False):
        seen.append(masked)
        return judge(self, loss, grad_norm, masked)

    monkeypatch.setattr(Guard, "judge", recorded)
    assert train("run", mask_phase__fraction=0.25).status == 0
    assert seen == [False] * 6 + [True] * 2


def test_running_scale():
    scale, values = RunningScale(), [3.0, 1.0, 4.0, 1.0, 5.0]
    for value in values:
        scale.add(value, window=100)
    tensor = torch.tensor(values, dtype=torch.float64)
    assert scale.mean == pytest.approx(tensor.mean().item())
    assert scale.variance == pytest.approx(tensor.var(correction=0).item())
    for _ in range(1000):
        scale.add(7.0, window=100)
    assert scale.limit(2.0) == pytest.approx(7.0, abs=0.05)
