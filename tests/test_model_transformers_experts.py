"""The experts implementation "dsmoe_wide" in stock OLMoE and Qwen3-MoE models, against their eager one."""

import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dsmoe.errors import UserError
from dsmoe.model import set_recompute

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "initializer_range": 0.2,
}


def stock(family, top_k, **more):
    torch.manual_seed(0)
    if family == "olmoe":
        model = OlmoeForCausalLM(
            OlmoeConfig(**SIZES, intermediate_size=6, num_experts_per_tok=top_k, pad_token_id=0, **more)
        )
    else:
        config = Qwen3MoeConfig(
            **SIZES, moe_intermediate_size=6, head_dim=8, num_experts_per_tok=top_k, **more
        )
        model = Qwen3MoeForCausalLM(config)
    return model.double()


def loss_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(1, 21).view(2, 10)
    outputs = model(ids, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    return outputs.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["olmoe", "qwen3"])
@pytest.mark.parametrize("top_k", [4, 2, 1])
@pytest.mark.parametrize("recompute", [True, False])
def test_equals_eager(family, top_k, recompute):
    model = stock(family, top_k)
    assert set_recompute(model, recompute) == 2
    expected, expected_gradients = loss_and_gradients(model, "eager")
    actual, gradients = loss_and_gradients(model, "dsmoe_wide")
    # the routers compute in float32 here: rounding is all that may differ
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-7)


def test_bfloat16_autocast_keeps_the_dtype_of_the_tokens():
    model = stock("olmoe", 4).float()
    model.set_experts_implementation("dsmoe_wide")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        experts = model.model.layers[0].mlp.experts
        x = torch.randn(3, 16)
        out = experts(x, torch.arange(4).repeat(3, 1), torch.full((3, 4), 0.25))
    assert out.dtype == torch.float32


def test_refuses_what_it_does_not_cover():
    model = stock("olmoe", 4, hidden_act="relu")
    model.set_experts_implementation("dsmoe_wide")
    with pytest.raises(UserError, match=r"cannot run OlmoeExperts: its activation is .*covers silu"):
        model(torch.tensor([[1, 2]]))
    config = GptOssConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    other = GptOssForCausalLM(config)
    other.set_experts_implementation("dsmoe_wide")
    with pytest.raises(UserError, match="cannot run GptOssExperts"):
        other(torch.tensor([[1, 2]]))
