"""The coefficient of the mutual information, steered in closed loop; and per-layer weights in the loss."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses_router import make_logits
from test_trainer_guard import poison
from test_trainer_resume import interrupt_before

from dsmoe.config.run import RouterLossSettings
from dsmoe.errors import UserError
from dsmoe.losses import router_losses, router_statistics, statistics_values
from dsmoe.trainer.mi_control import MIController, make_mi_controller

START = 0.1  # router_mi_loss_coef_mlp of the tiny runs
STEERED = {
    "router_loss__mi_target_active": 0.5,
    "router_loss__mi_control_gain": 0.3,
    "router_loss__mi_control_threshold": 0.9,
    "model__router_initializer_range": 0.3,
    "train__save_every_steps": 1,
    "train__keep_last": 99,
}
PER_LAYER = {**STEERED, "router_loss__mi_control": "layer"}


def statistics_of(shares, experts=4, tokens=10):
    """Statistics whose layers have these shares of experts above the threshold."""
    logits = torch.zeros(len(shares), tokens, 1, experts)
    statistics = router_statistics(list(logits), threshold=0.5)
    statistics.above_L = torch.tensor(shares, dtype=torch.float64) * experts * tokens
    return statistics


def controller(mode="model", layers=2, **changed):
    chosen = {"mi_target_active": 0.5, "mi_control_gain": 0.1, "router_mi_loss_coef_mlp": START, **changed}
    return MIController(RouterLossSettings(mi_control=mode, **chosen), layers)


def router_lines(run):
    return [line for line in run.log() if "router" in line]


def by_hand(coefs, shares, gain=0.3, target=0.5):
    """Coefficients after a step."""
    if len(coefs) == 1:
        shares = [sum(shares) / len(shares)]
    errors = [max(-1.0, min(1.0, (share - target) / target)) for share in shares]
    return [
        min(100 * START, max(START / 100, coef * math.exp(gain * error)))
        for coef, error in zip(coefs, errors)
    ]


def test_layer_weights_equal_a_loop_over_layers():
    logits, weights = make_logits(layers=3), torch.tensor([0.3, 0.0, 2.5])
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[1, 2:] = 0
    statistics = router_statistics(logits, mask)
    expected = 0.0
    for layer, weight in zip(logits, weights.tolist()):
        probs = layer[mask.bool()].softmax(-1)
        mean = probs.mean(0)
        value = (mean * mean.log()).sum() - (probs * probs.log()).sum(-1).mean()
        expected = expected + weight * value
    wanted = torch.autograd.grad(expected, logits)
    losses = router_losses(logits, statistics, mask, layer_weights_L=weights)
    for got, want in zip(torch.autograd.grad(losses.mutual_information, logits), wanted):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    plain = router_losses(logits, statistics, mask)
    assert torch.equal(losses.z_loss, plain.z_loss) and torch.equal(
        losses.load_balancing, plain.load_balancing
    )
    ones = router_losses(logits, statistics, mask, layer_weights_L=torch.ones(3)).mutual_information
    torch.testing.assert_close(ones, plain.mutual_information)


def test_experts_above_the_threshold_are_counted():
    """Token by token, without padding, in parts as in the whole; and nothing else changes."""
    logits, threshold = make_logits(batch=4, layers=2), 0.7
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[0, 3:] = mask[3, :4] = 0
    counted = [
        sum(
            sum(float(p) * 6 > threshold for p in row.detach().softmax(-1))
            for row, real in zip(layer.flatten(0, 1), mask.flatten())
            if real
        )
        for layer in logits
    ]
    whole = router_statistics(logits, mask, threshold=threshold)
    assert whole.above_L.tolist() == counted
    halves = [
        router_statistics([layer[rows] for layer in logits], mask[rows], threshold=threshold)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert torch.equal((halves[0] + halves[1]).above_L, whole.above_L)
    assert torch.equal(whole.unflatten(2 * whole.flatten()).above_L, 2 * whole.above_L)
    shares = statistics_values(whole)["above_threshold"]
    torch.testing.assert_close(shares, whole.above_L / (6 * mask.sum()))
    plain = router_statistics(logits, mask)
    assert len(plain.tensors()) == 5 and "above_threshold" not in statistics_values(plain)
    assert torch.equal(whole.flatten()[:-2], plain.flatten())


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["model", "layer"]),
    shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40),
    gain=st.floats(0.01, 1.0),
    target=st.floats(0.05, 0.95),
)
def test_updates_equal_the_formula(mode, shares, gain, target):
    steered = controller(mode, mi_control_gain=gain, mi_target_active=target)
    coefs = [START] * (2 if mode == "layer" else 1)
    for pair in shares:
        steered.update(statistics_of(pair))
        coefs = by_hand(coefs, pair, gain, target)
        assert steered.coefs == pytest.approx(coefs)
        assert all(START / 100 * 0.999 <= coef <= START * 100 * 1.001 for coef in steered.coefs)
    factors = torch.tensor(coefs, dtype=torch.float64).expand(2) / START
    torch.testing.assert_close(steered.layer_factors(), factors)
    again = controller(mode)
    again.load(json.loads(json.dumps(steered.state())))
    assert again.factors == steered.factors


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8])
def test_each_layer_reaches_the_target(target):
    """Where a larger coefficient means a smaller share, and layers differ in how much."""
    scales, steered = (0.02, 0.5), controller("layer", mi_target_active=target)
    for _ in range(400):
        shares = [1 / (1 + coef / scale) for coef, scale in zip(steered.coefs, scales)]
        steered.update(statistics_of(shares))
    assert shares == pytest.approx([target, target], abs=0.01)
    assert steered.coefs[1] / steered.coefs[0] == pytest.approx(25, rel=0.05)


def test_state_of_another_mode_is_left(tiny_config):
    steered = controller("layer")
    steered.load({"factors": [3.0]})
    assert steered.factors == [1.0, 1.0]
    steered.load({})
    assert make_mi_controller(RouterLossSettings(), tiny_config()) is None
    dense = tiny_config(kind="dense", num_experts=1)
    assert make_mi_controller(steered.settings, dense) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"mi_target_active": 0.0},
        {"mi_target_active": 1.0},
        {"mi_control_gain": 0.0},
        {"mi_control_threshold": -1.0},
        {"router_mi_loss_coef_mlp": 0.0},
    ],
)
def test_bad_settings_are_refused(changed):
    with pytest.raises(UserError, match=f"router_loss.{next(iter(changed))} is "):
        RouterLossSettings(mi_control="model", **{"router_mi_loss_coef_mlp": 0.1, **changed}).check()


@pytest.mark.parametrize("mode", ["model", "layer"])
def test_a_run_follows_the_formula_and_rests_in_the_mask_phase(train, mode):
    run = train("run", **STEERED, router_loss__mi_control=mode, mask_phase__fraction=0.25)
    assert run.status == 0
    lines, coefs = router_lines(run), [START] * (2 if mode == "layer" else 1)
    for line in lines:
        if line["step"] <= 6:
            coefs = by_hand(coefs, line["router"]["mlp"]["above_threshold"])
        assert line["mi_coefs"] == pytest.approx(coefs, rel=1e-4)
    assert lines[5]["mi_coefs"] != lines[4]["mi_coefs"]
    summary = run.summary()
    assert summary["mi_coefs"] == lines[-1]["mi_coefs"]


def test_the_coefficient_reaches_the_loss(train):
    """With an unreachable target it grows, and mutual information is learnt faster than without control."""
    settings = {**PER_LAYER, "train__total_tokens": 24 * 128, "router_loss__mi_target_active": 0.05}
    steered, plain = (
        train("steered", **settings),
        train("plain", **{**settings, "router_loss__mi_control": "none"}),
    )
    assert all(coef > 5 * START for coef in router_lines(steered)[-1]["mi_coefs"])
    last = [router_lines(run)[-1]["router"]["mlp"] for run in (steered, plain)]
    assert sum(last[0]["mutual_information"]) < sum(last[1]["mutual_information"]) - 0.05
    assert "above_threshold" not in last[1] and "mi_coefs" not in router_lines(plain)[-1]
    assert json.loads((plain.folder / "summary.json").read_text())["mi_coefs"] is None


def test_without_any_gain_nothing_changes(train):
    """Factors of one: the losses of a run without control."""
    settings = {**PER_LAYER, "router_loss__mi_control_gain": 1e-12}
    steered, plain = (
        train("steered", **settings),
        train("plain", **{**settings, "router_loss__mi_control": "none"}),
    )
    assert steered.losses() == pytest.approx(plain.losses(), rel=1e-6)


def test_it_waits_while_the_schedule_is_zero(train):
    run = train("run", **STEERED, router_loss__mi_control="model", router_loss__mi_schedule="decay",
                router_loss__mi_ramp_start=0.0, router_loss__mi_ramp_end=0.5)  # fmt: skip
    coefs = [line["mi_coefs"] for line in router_lines(run)]
    assert coefs[3] != coefs[2] and coefs[4:] == [coefs[3]] * 4


@pytest.mark.parametrize("statistics", ["exact", "running"])
def test_resumed_equals_uninterrupted(train, monkeypatch, statistics):
    settings = {**PER_LAYER, "router_loss__mi_statistics": statistics}
    whole = train("whole", **settings)
    with monkeypatch.context() as patch:
        interrupt_before(patch, 5)
        assert train("run", **settings).status == 130
    resumed = train("run", **settings, train__resume=True)
    assert resumed.log() == whole.log()
    for name, tensor in whole.weights().items():
        assert torch.equal(resumed.weights()[name], tensor), name


def test_a_skipped_step_moves_no_coefficient(train, monkeypatch):
    poison(monkeypatch, {2})
    run = train("run", **PER_LAYER)
    states = [
        json.loads((run.folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["mi_control"]
        for step in (1, 2, 3, 4)
    ]
    assert states[1] == states[2] and states[0] != states[1] and states[2] != states[3]


def test_accumulation_changes_nothing(train):
    runs = [train(f"micro{size}", **PER_LAYER, train__micro_batch_size=size) for size in (8, 2)]
    assert runs[1].losses() == pytest.approx(runs[0].losses(), rel=1e-5)
    for ours, theirs in zip(*map(router_lines, runs)):
        assert theirs["mi_coefs"] == pytest.approx(ours["mi_coefs"], rel=1e-4)


def test_moa_keeps_the_coefficient_of_attention(train):
    """Only the MLP routers are steered and measured."""
    settings = {
        **PER_LAYER, "model__num_attention_experts": 2, "model__qk_norm": "none",
        "router_loss__router_mi_loss_coef_attention": 0.1,
    }  # fmt: skip
    run = train("run", **settings)
    assert run.status == 0
    assert "above_threshold" in router_lines(run)[0]["router"]["mlp"]
    assert "above_threshold" not in router_lines(run)[0]["router"]["attention"]
