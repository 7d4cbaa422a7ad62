"""The optimiser's groups, and its step against AdamW's formula."""

import torch

from dsmoe.config.run import OptimSettings
from dsmoe.optim import build_optimizer


def test_groups(tiny_model):
    model = tiny_model(router_type="mlp", router_hidden_size=8, num_attention_experts=2, qk_norm="per_head")
    optimizer = build_optimizer(model, OptimSettings(weight_decay=0.3, router_lr_scale=0.5))
    by_name = {n: g for g in optimizer.param_groups for n in g["names"]}
    parameters = dict(model.named_parameters())
    assert set(by_name) == set(parameters)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(parameters)
    for group in optimizer.param_groups:
        assert all(parameters[name] is parameter for name, parameter in zip(group["names"], group["params"]))
    for name, parameter in parameters.items():
        assert by_name[name]["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0), name
        assert by_name[name]["lr_scale"] == (0.5 if ".router." in name else 1.0), name
    assert sum(".router." in name for name in by_name) == 8


def test_step_equals_the_formula(tiny_model):
    model = tiny_model()
    settings = OptimSettings(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(model, settings)
    parameter = model.model.layers[0].mlp.experts.down_proj
    expected, first, second = parameter.detach().clone(), 0.0, 0.0
    for step in (1, 2, 3):
        model(torch.arange(8)[None]).logits.square().mean().backward()
        gradient = parameter.grad.clone()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient.square()
        expected *= 1 - 0.01 * 0.1
        expected -= 0.01 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_frozen_parameters_stay_out(tiny_model):
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimSettings())
    assert not any("embed_tokens" in name for g in optimizer.param_groups for name in g["names"])
