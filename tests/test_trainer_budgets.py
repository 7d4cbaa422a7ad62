"""A mask phase with several target shares: one drawn a step, each with its threshold and its loop."""

import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer_guard import poison
from test_trainer_resume import interrupt_before

from dsmoe.accounting import training_flops_per_token
from dsmoe.config import DSMoEConfig
from dsmoe.config.run import MaskPhaseSettings
from dsmoe.errors import UserError
from dsmoe.model.routing import keep_experts
from dsmoe.trainer.first_thresholds import histogram, quantiles
from dsmoe.trainer.mask_phase import BudgetController, make_controller

TARGETS = [0.5, 0.75, 1.0]
PHASE = {
    "mask_phase__fraction": 0.75,
    "mask_phase__targets": TARGETS,
    "mask_phase__target_active": 0.6,
    "mask_phase__gain": 0.2,
    "train__save_every_steps": 1,
    "train__keep_last": 99,
}


def budgets(*targets, **changed):
    return BudgetController(MaskPhaseSettings(fraction=1.0, targets=list(targets), **changed), 3000)


def phase_lines(run):
    return [line for line in run.log() if "mask_phase" in line]


def controller_after(run, step):
    path = run.folder / "checkpoints" / f"step-{step:08d}" / "state.json"
    return json.loads(path.read_text())["controller"]


@settings(max_examples=15, deadline=None)
@given(
    targets=st.lists(
        st.floats(0.3, 0.9).map(lambda share: round(share, 2)), min_size=1, max_size=4, unique=True
    ),
)
def test_every_threshold_reaches_its_target(targets):
    """On experts whose N * p is spread evenly between 0 and 2; a step moves the threshold of its target alone."""
    controller = budgets(*targets, gain=0.1)
    for step in range(400 * len(targets)):
        before = dict(controller.thresholds)
        drawn = controller.target_at(step)
        policy = controller.routing(step, 100)["mlp"]
        assert policy == {"policy": "threshold", "threshold": before[drawn]}
        controller.update(min(1.0, max(0.0, 1 - policy["threshold"] / 2)), step)
        assert {t: v for t, v in controller.thresholds.items() if t != drawn} == {
            t: v for t, v in before.items() if t != drawn
        }
    for target, threshold in controller.thresholds.items():
        assert 1 - threshold / 2 == pytest.approx(target, abs=0.02)


def test_one_step_by_hand():
    controller = budgets(0.5, 0.75, gain=0.1)
    drawn = controller.target_at(7)
    controller.update(0.9 * drawn, 7)
    assert controller.thresholds[drawn] == pytest.approx(0.5 * math.exp(2 * 0.1 * -0.1))


def test_draws_follow_from_the_step_and_are_even():
    controller = budgets(*TARGETS)
    drawn = [controller.target_at(step) for step in range(3000)]
    assert drawn == [budgets(*TARGETS).target_at(step) for step in range(3000)]
    assert all(900 < drawn.count(target) < 1100 for target in TARGETS)


def test_all_experts_is_the_dense_mode_and_stays():
    controller = budgets(0.25, 1.0, target_active=0.9)
    assert controller.policy(8) == {"policy": "dense"} and controller.thresholds == {0.25: 0.5, 1.0: 0.0}
    step = next(step for step in range(99) if controller.target_at(step) == 1.0)
    assert controller.routing(step, 8) == {"mlp": {"policy": "dense"}}
    controller.update(0.1, step)
    assert controller.thresholds == {0.25: 0.5, 1.0: 0.0} and controller.steps == 1


def test_validation_runs_with_the_nearest():
    controller = budgets(0.2, 0.5, 0.8, target_active=0.4)
    controller.load({"threshold": 1.0, "steps": 3, "thresholds": {"0.2": 1.5, "0.5": 1.0, "0.8": 0.5}})
    assert controller.policy(8) == {"policy": "threshold", "threshold": 1.0} and controller.threshold == 1.0
    # of a run that was resumed with another set of targets; above N there is no threshold
    controller.load({"threshold": 99.0, "steps": 3, "thresholds": {"0.2": 1.5, "0.6": 99.0}})
    assert controller.thresholds == {0.2: 1.5, 0.5: 99.0, 0.8: 99.0}
    assert controller.policy(8)["threshold"] == 8.0


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(2, 12),
    spread=st.floats(0.1, 4.0),
    share=st.floats(0.0, 0.99),
    seed=st.integers(0, 999),
)
def test_start_thresholds_keep_the_wanted_share(experts, spread, share, seed):
    """By the rule of the policy itself, as near as ties and bins allow; parts of a batch add up."""
    draws = torch.Generator().manual_seed(seed)
    probs = (spread * torch.randn(2000, experts, generator=draws, dtype=torch.float64)).softmax(-1)
    wanted = 1 / experts + share * (1 - 1 / experts)
    counts = histogram(probs)
    assert (
        torch.equal(counts, histogram(probs[:700]) + histogram(probs[700:])) and counts.sum() == probs.numel()
    )
    (threshold,) = quantiles(counts, [wanted], experts)
    kept = keep_experts(probs, {"policy": "threshold", "threshold": min(threshold, experts)})
    assert float(kept.double().mean()) == pytest.approx(wanted, abs=0.02)


def test_start_with_nothing_below():
    """Probabilities of zero and a single threshold for all of them."""
    (threshold,) = quantiles(histogram(torch.eye(4)), [0.9], 4)
    assert 0 < threshold < 1e-5


def test_a_broken_step_gets_as_far_as_the_guard():
    probs = torch.full((3, 4), 0.25)
    probs[1] = float("nan")
    assert histogram(probs).sum() == 12


@pytest.mark.parametrize("targets", [[0.0], [0.5, 1.5], [-0.1], [float("nan")], [0.5, 0.5]])
def test_bad_targets_are_refused(targets):
    with pytest.raises(UserError, match=r"mask_phase\.targets"):
        MaskPhaseSettings(targets=targets).check()


def test_targets_that_cannot_be(tiny_config):
    with pytest.raises(UserError, match="give one of them"):
        MaskPhaseSettings(targets=[0.5], policies=["somewhere"]).check()
    with pytest.raises(UserError, match=r"0\.2 is below 1 / num_experts = 0\.25"):
        make_controller(MaskPhaseSettings(targets=[0.5, 0.2]), tiny_config(), 8)
    dense = tiny_config(kind="dense", num_experts=1)
    assert isinstance(make_controller(MaskPhaseSettings(targets=[0.25, 0.2]), dense, 8), BudgetController)


def test_a_run_learns_several_budgets(train):
    run = train("run", **PHASE, train__total_tokens=24 * 128, train__micro_batch_size=8)
    assert run.status == 0
    lines = phase_lines(run)
    assert [line["step"] for line in lines] == list(range(7, 25))
    shares = {target: [] for target in TARGETS}
    for line in lines:
        target = random.Random(line["step"] - 1).choice(TARGETS)
        assert line["mask_phase"]["target"] == target
        load = line["router"]["mlp"]["load"]
        shares[target].append(sum(sum(layer) for layer in load) / 8)
        assert line["mask_phase"]["threshold"] == line["mask_phase"]["thresholds"]["0.5"]
    # with all experts, loads are shares of p
    assert shares[1.0] == pytest.approx([0.25] * len(shares[1.0]), abs=1e-5)
    # the start is near each target from the first step on
    for target in (0.5, 0.75):
        assert shares[target][0] == pytest.approx(target, abs=0.1)
        assert sum(shares[target]) / len(shares[target]) == pytest.approx(target, abs=0.1)
    summary = run.summary()
    assert summary["mask_phase_thresholds"] == lines[-1]["mask_phase"]["thresholds"]
    assert summary["mask_phase_threshold"] == summary["mask_phase_thresholds"]["0.5"]
    assert summary["mask_phase_thresholds"]["0.5"] > summary["mask_phase_thresholds"]["0.75"]
    # the cost counts each step of the phase at what it kept, by the log
    kept = [
        [4.0] * 2
        if line["mask_phase"]["target"] == 1.0
        else [sum(layer) for layer in line["router"]["mlp"]["load"]]
        for line in lines
    ]
    config = DSMoEConfig.from_pretrained(run.folder / "final")
    assert summary["masked_tokens"] == 18 * 128
    per_step = [training_flops_per_token(config, 16, causal=True)] * 6 + [
        training_flops_per_token(config, 16, {"mlp": step}, causal=True, masked=True) for step in kept
    ]
    assert summary["training_flops"] == pytest.approx(sum(per_step) * 128, rel=1e-3)
    assert summary["training_flops"] < 0.95 * per_step[0] * 24 * 128
    # sparse validation keeps about what the nearest target says
    assert sum(summary["active_experts_sparse"]) / 8 == pytest.approx(0.5, abs=0.1)


def test_the_loop_is_the_controller(train):
    """Thresholds of the log, computed again from its shares."""
    run = train("run", **PHASE)
    lines = phase_lines(run)
    controller = budgets(*TARGETS, gain=0.2, target_active=0.6)
    for before, line in itertools.pairwise(lines):
        state = {"threshold": 0.5, "steps": 1, "thresholds": before["mask_phase"]["thresholds"]}
        controller.load(state)
        load = torch.tensor(line["router"]["mlp"]["load"])
        controller.update(float(load.mean()), line["step"] - 1)
        for target, threshold in controller.thresholds.items():
            assert line["mask_phase"]["thresholds"][str(target)] == pytest.approx(threshold, rel=1e-4)


@pytest.mark.parametrize("step", [2, 5])
def test_resumed_equals_uninterrupted(train, monkeypatch, step):
    """Before the first step of the phase, whose batch gives the thresholds, and within it."""
    whole = train("whole", **PHASE)
    with monkeypatch.context() as patch:
        interrupt_before(patch, step)
        assert train("run", **PHASE).status == 130
    resumed = train("run", **PHASE, train__resume=True)
    assert resumed.log() == whole.log()
    assert resumed.summary()["training_flops"] == whole.summary()["training_flops"]
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name


def test_a_skipped_step_moves_no_threshold(train, monkeypatch):
    """Nor does it start them: the next good step does."""
    poison(monkeypatch, {2, 5})
    run = train("run", **PHASE)
    fresh = {"threshold": 0.5, "steps": 0, "thresholds": {"0.5": 0.5, "0.75": 0.5, "1.0": 0.0}}
    assert controller_after(run, 2) == controller_after(run, 3) == fresh
    assert (
        controller_after(run, 4)["steps"] == 1
        and controller_after(run, 4)["thresholds"] != fresh["thresholds"]
    )
    assert controller_after(run, 5) == controller_after(run, 6) != controller_after(run, 7)


def test_accumulation_changes_nothing(train):
    runs = [train(f"micro{size}", **PHASE, train__micro_batch_size=size) for size in (8, 2)]
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=1e-5)
    for ours, theirs in zip(*map(phase_lines, runs)):
        for name, threshold in ours["mask_phase"]["thresholds"].items():
            assert theirs["mask_phase"]["thresholds"][name] == pytest.approx(threshold, rel=1e-4)
