"""Parameter counts from the config against shapes written out by hand and against the real model."""

import ast
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dsmoe.accounting
from dsmoe.accounting import (
    active_experts,
    count_parameters,
    embedding_parameters,
    stored_experts,
    total_parameters,
)
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_experts": 4,
}


def kept_experts(layers, experts):
    """Experts that are stored per layer, or None."""
    stored = st.sets(st.integers(0, experts - 1), min_size=1).map(sorted)
    return st.none() | st.lists(stored, min_size=layers, max_size=layers)


@st.composite
def small_configs(draw):
    heads_per_expert, attention_experts = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    heads = heads_per_expert * attention_experts
    key_value_heads = heads_per_expert
    if attention_experts == 1:
        key_value_heads = draw(st.sampled_from([n for n in (1, 2) if heads % n == 0]))
    experts = draw(st.sampled_from([1, 2, 5]))
    layers = draw(st.integers(1, 3))
    hidden_router = draw(st.sampled_from([0, 3]))
    norms = ["none", "per_head"] + (["full"] if attention_experts == 1 else [])
    return DSMoEConfig(
        kind="dense" if experts == attention_experts == 1 else "dsmoe",
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 20)),
        intermediate_size=experts * draw(st.integers(1, 9)),
        num_hidden_layers=layers,
        num_experts=experts,
        mlp_type=draw(st.sampled_from(["swiglu", "gelu"])),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        num_attention_experts=attention_experts,
        qk_norm=draw(st.sampled_from(norms)),
        router_type="mlp" if hidden_router else "linear",
        router_hidden_size=hidden_router,
        tie_word_embeddings=draw(st.booleans()),
        mlp_kept_experts=draw(kept_experts(layers, experts)),
        attention_kept_experts=draw(kept_experts(layers, attention_experts)),
    )


def model_parameters(config):
    """Parameters of the instantiated model by name (meta device: shapes without storage)."""
    with torch.device("meta"):
        model = DSMoEForCausalLM(config)
    return dict(model.named_parameters())  # tied parameters appear once


def test_counts_equal_shapes_written_out_by_hand():
    config = DSMoEConfig(
        vocab_size=100,
        hidden_size=8,
        intermediate_size=24,
        num_hidden_layers=2,
        num_experts=4,
        mlp_type="swiglu",
        num_attention_heads=6,
        num_attention_experts=3,
        head_dim=4,
        qk_norm="per_head",
        router_type="mlp",
        router_hidden_size=5,
        tie_word_embeddings=False,
    )
    shapes = {
        "embedding": [(100, 8), (100, 8)],
        "attention": 2
        * [(3, 8, 8), (8, 8), (8, 8), (3, 8, 8)],  # q [A, h*hd, d], k and v [KV*hd, d], o [A, d, h*hd]
        "mlp": 2 * [(4, 12, 8), (4, 6, 8)],
        "router": 2 * [(5, 8), (3, 5), (5, 8), (4, 5)],
        "norm": 2 * [(8,), (8,), (4,), (4,)] + [(8,)],
    }
    counts = count_parameters(config)
    for part, expected in shapes.items():
        assert getattr(counts, part) == sum(torch.empty(shape).numel() for shape in expected), part
    assert counts.total == counts.active == total_parameters(config)
    assert counts.total == counts.embedding + counts.attention + counts.mlp + counts.router + counts.norm


@settings(deadline=None, max_examples=60)
@given(config=small_configs())
def test_counts_equal_numel_of_the_model(config):
    parameters = model_parameters(config)
    counts = count_parameters(config)
    assert (
        counts.total
        == sum(parameter.numel() for parameter in parameters.values())
        == total_parameters(config)
    )

    def numel(*words):
        return sum(p.numel() for name, p in parameters.items() if any(word in name for word in words))

    assert counts.router == numel("router")
    assert counts.norm == numel("norm")
    assert counts.embedding == numel("embed_tokens", "lm_head") == embedding_parameters(config)
    assert counts.attention == numel("self_attn") - numel("self_attn.router", "q_norm", "k_norm")
    for layer in counts.layers:
        assert layer.total == numel(f"layers.{layer.layer}.")
    assert counts.mlp == numel("mlp.experts")


@settings(deadline=None, max_examples=30)
@given(config=small_configs(), data=st.data())
def test_active_counts_drop_exactly_the_unused_experts(config, data):
    layers = range(config.num_hidden_layers)
    kept = {
        part: [data.draw(st.integers(1, config.num_kept_experts(part, layer))) for layer in layers]
        for part in ("mlp", "attention")
    }
    counts = count_parameters(config, kept)
    unused = 0
    for name, parameter in model_parameters(config).items():
        # the stored experts stand in the first dimension
        stored, per_expert = parameter.shape[0], parameter.numel() // parameter.shape[0]
        if ".mlp.experts." in name:
            unused += (stored - kept["mlp"][int(name.split(".")[2])]) * per_expert
        elif parameter.dim() == 3:
            unused += (stored - kept["attention"][int(name.split(".")[2])]) * per_expert
    assert counts.active == counts.total - unused
    assert counts.active_non_embedding == counts.non_embedding - unused
    # shares are of the original N
    shares = {"mlp": config.num_experts, "attention": config.num_attention_experts}
    for part, num_experts in shares.items():
        fraction = getattr(counts, f"{part}_active_fraction")
        assert fraction == pytest.approx(sum(kept[part]) / len(kept[part]) / num_experts)


def test_removal_lowers_what_is_stored_and_no_active_count():
    policy = {"policy": "top_k", "k": 2}
    whole = DSMoEConfig(**SMALL, mlp_routing=policy)
    removed = DSMoEConfig(**SMALL, mlp_routing=policy, mlp_kept_experts=[[0, 1], [1, 2, 3], None])
    before, after = count_parameters(whole), count_parameters(removed)
    assert before.total - after.total == before.mlp - after.mlp == 3 * 384
    assert [layer.total for layer in before.layers][2] == after.layers[2].total
    assert (after.active, after.router) == (before.active, before.router)
    assert after.mlp_active_fraction == before.mlp_active_fraction
    assert stored_experts(removed, "mlp") == [2, 3, 4]
    # "dense" keeps all that remain
    assert active_experts(DSMoEConfig(**SMALL, mlp_kept_experts=[[0], [1, 2], None]), "mlp") == [1, 2, 4]
    with pytest.raises(UserError, match=r"\[0\] is 3; a token keeps from 1 to 2"):
        count_parameters(removed, {"mlp": [3, 1, 1]})
    # one that remains is kept by every policy
    single = DSMoEConfig(
        **SMALL, mlp_routing={"policy": "threshold", "threshold": 1.0}, mlp_kept_experts=[[0], [1], [2]]
    )
    assert active_experts(single, "mlp") == [1, 1, 1]


def test_policies_give_the_active_experts():
    routing = [
        {"policy": "dense"},
        {"policy": "top_k", "k": 3},
        {"policy": "threshold_top_k", "threshold": 0.5, "k": 2},
    ]
    config = DSMoEConfig(**SMALL, mlp_routing=routing)
    assert active_experts(config, "mlp") == [4, 3, 2]
    assert active_experts(config, "attention") == [1, 1, 1]
    counts = count_parameters(config)
    assert counts.active == counts.total - (0 + 1 + 2) * 3 * 16 * 8
    assert [layer.active - layer.total for layer in counts.layers] == [0, -1 * 384, -2 * 384]
    assert counts.mlp_active_fraction == pytest.approx(9 / 12)


def test_measured_means_replace_the_policies_of_their_part_only():
    config = DSMoEConfig(**SMALL, mlp_routing={"policy": "top_p", "top_p": 0.8})
    counts = count_parameters(config, {"mlp": [1, 1.5, 4]})
    assert [layer.mlp_active_experts for layer in counts.layers] == [1, 1.5, 4]
    assert counts.active == counts.total - round(5.5 * 384)
    assert counts.attention_active_fraction == 1


@pytest.mark.parametrize(
    "policy",
    [
        {"policy": "threshold", "threshold": 0.5},
        {"policy": "top_p", "top_p": 0.5},
        {"policy": "threshold_top_k", "threshold": 0.5},
    ],
)
def test_policies_that_depend_on_the_text_ask_for_a_measured_mean(policy):
    config = DSMoEConfig(**SMALL, mlp_routing=policy)
    with pytest.raises(UserError, match=r"mlp_routing\[0\].*measured mean"):
        count_parameters(config)
    assert total_parameters(config) > 0  # the total needs no policy


@pytest.mark.parametrize(
    ("mean_active", "message"),
    [
        ({"mlp": [1, 2]}, "has 2 numbers; the model has 3 layers"),
        ({"mlp": [1, 2, 4.5]}, r"\[2\] is 4.5; a token keeps from 1 to 4"),
        ({"mlp": [1, 0.5, 1]}, r"\[1\] is 0.5"),
        ({"mlp": [1, float("nan"), 1]}, r"\[1\] is nan"),
        ({"moe": [1, 2, 3]}, "no part 'moe'"),
    ],
)
def test_bad_measured_means_are_refused(mean_active, message):
    with pytest.raises(UserError, match=message):
        count_parameters(DSMoEConfig(**SMALL), mean_active)


def test_any_object_with_the_attributes_will_do():
    config = DSMoEConfig(**SMALL, num_attention_heads=4, mlp_routing={"policy": "top_k", "k": 2})
    names = [name for name in config.to_dict() if not name.startswith("_")]
    plain = SimpleNamespace(**{name: getattr(config, name) for name in names})
    plain.head_dim = plain.num_key_value_heads = plain.attention_routing = None  # derived when null
    plain.mlp_routing = {"policy": "top_k", "k": 2}  # one policy for all layers
    del plain.mlp_kept_experts, plain.attention_kept_experts  # nothing was removed
    assert count_parameters(plain) == count_parameters(config)


def test_counts_are_frozen_and_json_ready():
    counts = count_parameters(DSMoEConfig(**SMALL))
    with pytest.raises(FrozenInstanceError):
        counts.mlp = 0
    assert counts.as_dict()["total"] == counts.total
    assert counts.as_dict()["layers"][0]["total"] == counts.layers[0].total


def test_the_package_imports_neither_torch_nor_transformers():
    folder = Path(dsmoe.accounting.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in ("torch", "transformers"), path
                # the config class imports transformers; only the reader of the paper's YAMLs needs it
                assert name != "dsmoe.config" or path.name == "paper.py", path
