"""What a run's summary says of its cost, against `dsmoe.accounting` by hand."""

import json

import pytest
import torch

from dsmoe.accounting import (
    forward_flops_per_token,
    training_flops_per_token,
    training_forward_flops_per_token,
)
from dsmoe.config import DSMoEConfig
from dsmoe.losses import RouterStatistics
from dsmoe.trainer.cost import MaskedSteps
from dsmoe.trainer.statistics import RunningMean

LENGTH, TOKENS = 16, 8 * 128
MI = {"router_loss__router_mi_loss_coef_mlp": 1e-3}


def config_of(run):
    return DSMoEConfig.from_pretrained(run.folder / "final")


def statistics(load_LN, num_tokens):
    load_LN = torch.tensor(load_LN)
    layers = torch.zeros(len(load_LN))
    return {"mlp": RouterStatistics(load_LN, load_LN, layers, layers, torch.tensor(float(num_tokens)))}


def test_masked_steps_are_means_of_what_was_kept(tiny_config):
    config, steps = tiny_config(), MaskedSteps()
    config.mlp_routing = [{"policy": "threshold", "threshold": 1.0}] * 2
    steps.add(config, statistics([[4.0, 0.0, 4.0, 0.0], [8.0, 8.0, 8.0, 0.0]], 8))
    assert steps.mean_active() == {"mlp": [1.0, 3.0]}
    # keeping all is told in words, since loads are shares then
    for policy in ({"policy": "dense"}, {"policy": "top_k", "k": 4}):
        config.mlp_routing = [policy] * 2
        steps.add(config, statistics([[2.0, 2.0, 2.0, 2.0]] * 2, 8))
    assert steps.mean_active() == {"mlp": [3.0, (3 + 4 + 4) / 3]}
    again = MaskedSteps()
    again.load(json.loads(json.dumps(steps.state())))
    assert again == steps


def test_accumulation_costs_a_forward_more(train):
    plain = train("plain", train__micro_batch_size=8, **MI)
    halves = train("halves", train__micro_batch_size=4, **MI)
    forward = training_forward_flops_per_token(config_of(plain), LENGTH, causal=True)
    found = halves.summary()["training_flops"] - plain.summary()["training_flops"]
    assert found == pytest.approx(forward.layers * TOKENS)
    running = train("running", train__micro_batch_size=4, router_loss__mi_statistics="running", **MI)
    assert running.summary()["training_flops"] == plain.summary()["training_flops"]


def test_a_frozen_teacher_costs_its_own_size(train):
    teacher = train("teacher", model__hidden_size=32, train__total_tokens=128)
    run = train(
        "run", distillation__coef=0.5, distillation__teacher=teacher.folder, train__micro_batch_size=8
    )
    student = training_flops_per_token(config_of(run), LENGTH, causal=True)
    taught = forward_flops_per_token(config_of(teacher), (LENGTH + 1) / 2, all_experts=True).total
    assert run.summary()["training_flops"] == pytest.approx((student + taught) * TOKENS)


@pytest.mark.parametrize("attention", [False, True])
def test_an_smoe_whose_experts_depend_on_the_text(train, attention):
    settings = {"model__kind": "smoe", "model__mlp_routing": {"policy": "threshold", "threshold": 1.0}}
    if attention:
        settings |= {
            "model__num_attention_experts": 2, "model__qk_norm": "per_head",
            "model__attention_routing": {"policy": "threshold", "threshold": 1.0},
        }  # fmt: skip
    run = train("run", **settings)
    assert run.status == 0
    summary = run.summary()
    assert 0.25 <= summary["mlp_active_fraction"] < 1
    assert summary["num_params_active"] < summary["num_params_total"]
    assert summary["training_flops"] < training_flops_per_token(
        DSMoEConfig(**{**config_of(run).to_dict(), "kind": "dsmoe"}), LENGTH, causal=True
    ) * TOKENS  # fmt: skip


def test_a_running_mean_comes_back_to_the_device_of_its_statistics():
    seen = statistics([[1.0, 3.0]], 4)
    mean = RunningMean(0.5)
    mean.update(seen)
    again = RunningMean(0.5)
    again.load(mean.tensors())
    on_meta = {"mlp": RouterStatistics(*(tensor.to("meta") for tensor in seen["mlp"].tensors()))}
    assert again.update(on_meta)["mlp"].device.type == "meta"
