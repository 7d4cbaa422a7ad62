"""One step is one step, however its batch is cut into micro-batches."""

import pytest
import torch

from dsmoe.losses import router_statistics
from dsmoe.trainer.statistics import RunningMean
from dsmoe.trainer.step import Stepper

# so large that wrong statistics would show in every loss
LARGE = {
    "router_loss__router_mi_loss_coef_mlp": 3.0,
    "optim__grad_clip": 0.0,
    "train__total_tokens": 6 * 128,
}
SMOE = {
    "model__kind": "smoe",
    "model__mlp_routing": {"policy": "top_k", "k": 2},
    "router_loss__router_mi_loss_coef_mlp": 0.0,
    "router_loss__load_balancing_coef": 3.0,
}
Z_LOSS = {"router_loss__router_mi_loss_coef_mlp": 0.0, "router_loss__router_z_loss_coef": 3.0}
ISOLATED = {"data__isolate_documents": True}
MOA = {
    "model__num_attention_experts": 2,
    "model__qk_norm": "none",
    "router_loss__router_mi_loss_coef_attention": 3.0,
}


@pytest.mark.parametrize(
    "arm", [{}, SMOE, Z_LOSS, ISOLATED, MOA], ids=["dsmoe", "smoe", "z", "isolated", "moa"]
)
def test_accumulation_changes_nothing(train, arm):
    whole = train("one", **{**LARGE, **arm, "train__micro_batch_size": 8})
    parts = train("four", **{**LARGE, **arm, "train__micro_batch_size": 2})
    assert whole.status == parts.status == 0
    assert parts.losses() == pytest.approx(whole.losses(), rel=1e-5)
    for ours, theirs in zip(parts.log(), whole.log()):
        if "router" in ours:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
            for name, values in ours["router"]["mlp"].items():
                torch.testing.assert_close(
                    torch.tensor(values),
                    torch.tensor(theirs["router"]["mlp"][name]),
                    rtol=1e-4,
                    atol=2e-4,
                    msg=name,
                )


@pytest.mark.parametrize("arm", [{}, SMOE], ids=["dsmoe", "smoe"])
def test_statistics_of_micro_batches_alone_would_show(train, monkeypatch, arm):
    """The test above can fail: with each micro-batch's own statistics the losses are others."""
    whole = train("one", **{**LARGE, **arm, "train__micro_batch_size": 8})
    monkeypatch.setattr(Stepper, "needs_gathering", lambda *_: False)
    parts = train("four", **{**LARGE, **arm, "train__micro_batch_size": 2})
    worst = max(abs(a / b - 1) for a, b in zip(parts.losses(), whole.losses()))
    assert worst > 1e-4


def test_running_statistics_with_one_micro_batch_and_no_memory_are_exact(train):
    settings = {**LARGE, "train__micro_batch_size": 8}
    exact = train("exact", **settings)
    running = train(
        "running", **settings, router_loss__mi_statistics="running", router_loss__mi_running_decay=0.0
    )
    assert running.losses() == pytest.approx(exact.losses(), rel=1e-6)


def test_running_means_are_weighted_means():
    """Of micro-batches, the newest most: sum (1 - d) d^i p_i / sum (1 - d) d^i."""
    decay, draws = 0.8, torch.Generator().manual_seed(0)
    running, seen = RunningMean(decay), []
    for _ in range(4):
        logits = torch.randn(1, 7, 5, generator=draws, dtype=torch.float64)
        seen.append(logits.softmax(-1).mean((0, 1)))
        found = running.update({"mlp": router_statistics([logits])})["mlp"][0]
        weights = [(1 - decay) * decay**age for age in reversed(range(len(seen)))]
        wanted = sum(weight * one for weight, one in zip(weights, seen)) / sum(weights)
        torch.testing.assert_close(found, wanted)


def test_the_schedule_of_the_mutual_information_reaches_the_loss(train):
    """One that has decayed to nothing is a run without that loss; the coefficient as it is is another."""
    settings = {
        **LARGE,
        "router_loss__mi_schedule": "ramp",
        "router_loss__mi_ramp_start": 1.0,
        "router_loss__mi_ramp_end": 1.0,
    }
    without = train("without", **{**LARGE, "router_loss__router_mi_loss_coef_mlp": 0.0})
    assert train("later", **settings).losses() == without.losses()
    assert train("always", **LARGE).losses() != without.losses()


def test_running_statistics_are_near(train):
    """With accumulation they are no more than near, and the loss goes the same way."""
    settings = {**LARGE, "train__micro_batch_size": 2, "train__total_tokens": 12 * 128}
    exact = train("exact", **settings)
    running = train("running", **settings, router_loss__mi_statistics="running")
    assert running.losses() != exact.losses()
    final = [run.log()[-2]["router"]["mlp"]["mutual_information"] for run in (exact, running)]
    assert sum(final[1]) < 0.5 * sum(final[0]) < 0


def test_mutual_information_is_learnt(train):
    """It falls towards -log 4 where its coefficient is large, and routers stay near uniform where it is zero."""
    settings = {**LARGE, "train__total_tokens": 20 * 128}
    with_loss = train("with", **settings).log()
    without = train("without", **{**settings, "router_loss__router_mi_loss_coef_mlp": 0.0}).log()
    last = [[line for line in log if "router" in line][-1]["router"]["mlp"] for log in (with_loss, without)]
    for layer in range(2):
        assert last[0]["mutual_information"][layer] < last[1]["mutual_information"][layer] - 0.2
        assert last[0]["entropy"][layer] > 1.2


def test_checkpointing_and_plain_agree(train):
    settings = {"train__total_tokens": 4 * 128, "router_loss__router_mi_loss_coef_mlp": 1.0}
    plain = train("plain", **settings)
    for name in ("gradient_checkpointing", "recompute_experts"):
        losses = train(name, **settings, **{f"train__{name}": True}).losses()
        assert losses == pytest.approx(plain.losses(), rel=1e-6), name


def test_bf16_is_near(train):
    settings = {"train__total_tokens": 4 * 128}
    plain = train("f32", **settings)
    autocast = train("bf16", **settings, train__precision="bf16")
    assert autocast.losses() != plain.losses()
    assert autocast.losses() == pytest.approx(plain.losses(), rel=1e-2)
    assert {tensor.dtype for tensor in autocast.weights().values()} == {torch.float32}
