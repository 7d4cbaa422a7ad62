"""FLOPs from the config against torch's own counter on the real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.accounting import (
    count_parameters,
    forward_flops_per_token,
    inference_flops_per_token,
    training_flops_per_token,
)
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, set_recompute

BATCH, LENGTH = 2, 6
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CONFIGS = {
    "dense": {"kind": "dense", "num_experts": 1},
    "dense_gqa_gelu": {
        "kind": "dense",
        "num_experts": 1,
        "num_key_value_heads": 2,
        "mlp_type": "gelu",
        "head_dim": 6,
    },
    "dsmoe_linear_router": {"num_experts": 4},
    "dsmoe_moa": {
        "num_experts": 4,
        "num_attention_experts": 2,
        "qk_norm": "per_head",
        "mlp_type": "gelu",
        "router_type": "mlp",
        "router_hidden_size": 5,
    },
    "dsmoe_removed": {"num_experts": 4, "mlp_kept_experts": [[0, 3], [1, 2, 3]]},
    "dsmoe_moa_removed": {
        "num_experts": 4,
        "num_attention_experts": 2,
        "qk_norm": "per_head",
        "mlp_kept_experts": [None, [2]],
        "attention_kept_experts": [[1], None],
    },
}
MOA = {"num_attention_experts": 2, "qk_norm": "per_head"}
SMOE = {"kind": "smoe", "num_experts": 4, "mlp_routing": {"policy": "top_k", "k": 2}}


def make(**fields):
    # eager attention: the products of queries, keys and values are then ordinary matrix products
    torch.manual_seed(0)
    config = DSMoEConfig(**SMALL, **fields)
    config._attn_implementation = "eager"
    return config, DSMoEForCausalLM(config)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_training_flops_equal_torchs_count(name):
    config, model = make(**CONFIGS[name])
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    forward = counted(lambda: model(ids, use_cache=False))
    assert forward_flops_per_token(config, LENGTH).total * BATCH * LENGTH == forward
    both = counted(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    assert training_flops_per_token(config, LENGTH) * BATCH * LENGTH == both


@pytest.mark.usefixtures("kept_experts_alone")
@pytest.mark.parametrize("attention", [{}, {**MOA, "attention_routing": {"policy": "top_k", "k": 1}}])
def test_training_of_an_smoe_counts_only_the_kept_experts(attention):
    config, model = make(**SMOE, **attention)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    both = counted(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    assert training_flops_per_token(config, LENGTH) * BATCH * LENGTH == both


@pytest.mark.usefixtures("kept_experts_alone")
@pytest.mark.parametrize("attention", [{}, {**MOA, "attention_routing": {"policy": "top_k", "k": 1}}])
def test_a_step_of_the_mask_phase_counts_only_the_kept_experts(attention):
    config, model = make(num_experts=4, mlp_routing={"policy": "threshold", "threshold": 1.0}, **attention)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    outputs = {}
    both = counted(
        lambda: outputs.update(model(ids, labels=ids, use_cache=False)) or outputs["loss"].backward()
    )
    kept = [
        float((4 * logits.softmax(-1) >= 1.0).sum()) / (BATCH * LENGTH) for logits in outputs["router_logits"]
    ]
    assert all(1 <= mean < 4 for mean in kept)
    step = training_flops_per_token(config, LENGTH, {"mlp": kept}, masked=True)
    assert step * BATCH * LENGTH == pytest.approx(both, rel=1e-12)
    assert step < training_flops_per_token(config, LENGTH)


def test_decoding_flops_after_removal_equal_torchs_count():
    # each layer keeps one of two stored experts, of four; the routers score all
    config, model = make(
        **{**CONFIGS["dsmoe_moa_removed"], "mlp_kept_experts": [[0, 1], [1, 3]]},
        mlp_routing={"policy": "top_k", "k": 1},
        attention_routing={"policy": "top_k", "k": 1},
    )
    with torch.no_grad():
        step = counted(lambda: model(torch.tensor([[3]]), use_cache=False))
    assert inference_flops_per_token(config, 1) == step


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_decoding_flops_equal_torchs_count_at_one_token(kept):
    # one token and no cache: context 1; the kept heads alone form the query
    config, model = make(
        **CONFIGS["dsmoe_moa"],
        mlp_routing={"policy": "top_k", "k": kept},
        attention_routing={"policy": "top_k", "k": min(kept, 2)},
    )
    with torch.no_grad():
        step = counted(lambda: model(torch.tensor([[3]]), use_cache=False))
    assert inference_flops_per_token(config, 1) == step


def test_context_adds_scores_of_the_kept_heads_only():
    config, _ = make(**CONFIGS["dsmoe_moa"], attention_routing={"policy": "top_k", "k": 1})
    added = inference_flops_per_token(config, 101) - inference_flops_per_token(config, 1)
    assert (
        added == 100 * 2 * 2 * 4 * 2 * 2
    )  # keys, two products of 2*n*k, head_dim, heads of one expert, layers


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_recomputed_experts_equal_torchs_count(mlp_type):
    config, model = make(num_experts=4, mlp_type=mlp_type)
    set_recompute(model, True)
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    both = counted(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    step = training_flops_per_token(config, LENGTH, recompute_experts=True)
    assert step * BATCH * LENGTH == pytest.approx(both, rel=1e-12)
    assert step > training_flops_per_token(config, LENGTH)


def test_gradient_checkpointing_adds_one_forward_of_the_layers():
    config, _ = make(**CONFIGS["dsmoe_moa"])
    forward = forward_flops_per_token(config, LENGTH)
    plain = training_flops_per_token(config, LENGTH)
    assert plain == 3 * forward.total
    assert (
        training_flops_per_token(config, LENGTH, gradient_checkpointing=True)
        == plain + forward.total - forward.lm_head
    )


def test_gradient_checkpointing_is_what_torch_recomputes_at_most():
    config, model = make(**CONFIGS["dsmoe_linear_router"])
    model.train()
    # renamed by transformers 5.2x, which warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH)
    step = counted(lambda: model(ids, labels=ids, use_cache=False).loss.backward())
    plain = training_flops_per_token(config, LENGTH) * BATCH * LENGTH
    with_recomputation = (
        training_flops_per_token(config, LENGTH, gradient_checkpointing=True) * BATCH * LENGTH
    )
    assert plain < step <= with_recomputation


def test_a_dsmoe_trains_all_experts_whatever_its_policy_for_inference():
    config, _ = make(num_experts=4)
    sparse, _ = make(num_experts=4, mlp_routing={"policy": "threshold", "threshold": 0.5})
    assert training_flops_per_token(sparse, LENGTH) == training_flops_per_token(config, LENGTH)
    with pytest.raises(UserError, match="measured mean"):
        inference_flops_per_token(sparse, LENGTH)
    assert inference_flops_per_token(sparse, LENGTH, {"mlp": [4, 4]}) == inference_flops_per_token(
        config, LENGTH
    )


def test_flops_without_scores_are_twice_the_active_matrix_parameters():
    config = DSMoEConfig(**SMALL, **SMOE)
    counts = count_parameters(config)
    flops = inference_flops_per_token(config, 0)
    assert flops == 2 * (counts.active - counts.norm)  # tied: the table's one use is the output projection


def test_causal_counting_takes_the_mean_context():
    config = DSMoEConfig(**SMALL, num_experts=4)
    steps = [inference_flops_per_token(config, context) for context in range(1, LENGTH + 1)]
    assert training_flops_per_token(config, LENGTH, causal=True) == pytest.approx(3 * sum(steps) / LENGTH)
