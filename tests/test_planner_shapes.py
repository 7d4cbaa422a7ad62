"""Parameter counts and memory of the planner against the formulas of the source and `dsmoe.accounting`."""

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.accounting import kv_cache_bytes, total_parameters, training_memory_bytes, weight_bytes
from dsmoe.errors import UserError
from dsmoe.planner.memory import Serving, element_bytes, training_parts
from dsmoe.planner.shapes import LAW_VOCAB_SIZE, Family


def config_of(family, hidden_size):
    """What `dsmoe.accounting` needs of a configuration; norms as by default."""
    shape = family.shape(hidden_size)
    return SimpleNamespace(
        hidden_size=hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=None,
        head_dim=None,
        num_attention_experts=1,
        num_experts=family.num_experts,
        mlp_type="swiglu",
        qk_norm="full",
        router_type="linear",
        router_hidden_size=0,
        vocab_size=family.vocab_size,
        tie_word_embeddings=False,
    )


def norms_and_routers(family, hidden_size):
    layers = hidden_size // 64
    routers = 0 if family.num_experts == 1 else family.num_experts * hidden_size
    return layers * (routers + 4 * hidden_size) + hidden_size


@pytest.mark.parametrize(
    ("family", "hidden_size"),
    [
        (Family("dense"), 1664),
        (Family("smoe", 2), 1408),
        (Family("smoe", 4), 1152),
        (Family("dsmoe", 32, 0.33), 1024),
        (Family("dsmoe", 192, 0.33), 448),  # routers and norms are 2.4% of it without embeddings
    ],
)
def test_counts_and_bytes_agree_with_accounting(family, hidden_size):
    config = config_of(family, hidden_size)
    extra = norms_and_routers(family, hidden_size)
    assert total_parameters(config) - extra == family.num_params_total(hidden_size)
    serving = Serving(16_384, 8)
    assert total_parameters(config) == family.num_params_stored(hidden_size)
    assert weight_bytes(config) == serving.weight_bytes(family, hidden_size)
    assert kv_cache_bytes(config, 16_384, 8) == serving.kv_cache_bytes(hidden_size)
    assert training_memory_bytes(config) == sum(training_parts(family, hidden_size).values())


def test_the_counting_of_the_law():
    d, layers, vocab = 1024, 16, LAW_VOCAB_SIZE
    for experts in (2, 8, 32):
        family = Family("smoe", experts)
        assert family.num_params_total(d) == 2 * d * vocab + (4 + 9 * experts) * layers * d**2
        assert family.num_params_active(d) == 2 * d * vocab + 13 * layers * d**2
    dsmoe = Family("dsmoe", 32, 0.25)
    assert dsmoe.num_params_total(d) == Family("dense").num_params_total(d) == dsmoe.num_params_trained(d)
    assert dsmoe.num_params_active(d) == 2 * d * vocab + (4 + 9 * 0.25) * layers * d**2
    assert dsmoe.mean_k == 8


def test_flops_per_token_at_1_1b_total():
    """35.8% and 61.35% less per token at a matched total of 1.1B, from the shapes that the source prints."""
    dense = Family("dense").num_params_active(1664)
    for experts, hidden_size, reduction in ((2, 1408, 35.8), (4, 1152, 61.35)):
        active = Family("smoe", experts).num_params_active(hidden_size)
        assert 100 * (1 - active / dense) == pytest.approx(reduction, abs=0.1)
        assert Family("smoe", experts).num_params_total(hidden_size) == pytest.approx(1.1e9, rel=0.03)


@settings(deadline=None, max_examples=30)
@given(
    hidden_size=st.floats(64, 20_000),
    fewer=st.integers(1, 63),
    more=st.integers(1, 63),
    context=st.integers(0, 100_000),
)
def test_more_experts_never_take_less_memory(hidden_size, fewer, more, context):
    serving, (fewer, more) = Serving(context), sorted((fewer, more))
    assert serving.total_bytes(Family("smoe", more), hidden_size) >= serving.total_bytes(
        Family("smoe", fewer), hidden_size
    )


@settings(deadline=None, max_examples=30)
@given(hidden_size=st.floats(64, 20_000), experts=st.integers(2, 64), share=st.floats(0.05, 1))
def test_memory_uses_all_parameters(hidden_size, experts, share):
    for family in (Family("smoe", experts), Family("dsmoe", experts, share)):
        expected = 2 * family.num_params_stored(hidden_size)
        assert Serving().total_bytes(family, hidden_size) == expected
        assert expected >= 2 * family.num_params_active(hidden_size)


@pytest.mark.parametrize("experts", [1, 2, 5, 7, 32, 48, 100])
def test_steps_divide_into_experts(experts):
    family = Family("dsmoe", experts, 0.33)
    shape = family.shape(family.step * 3)
    assert shape.hidden_size % 64 == 0
    assert shape.moe_intermediate_size * experts == shape.intermediate_size == 3 * shape.hidden_size
    assert not any(64 * k * 3 % experts == 0 for k in range(1, family.step // 64))


def test_a_token_keeps_at_least_one_expert():
    assert Family("dsmoe", 2, 0.1).mean_k == 1
    assert Family("dsmoe", 1, 0.1).active_share == 1


@pytest.mark.parametrize("wrong", [("dense", 2), ("smoe", 0), ("moa", 1)])
def test_impossible_families(wrong):
    with pytest.raises(UserError, match=str(wrong[0])):
        Family(*wrong)


def test_hidden_size_of_a_total():
    family = Family("smoe", 8)
    assert family.num_params_total(family.hidden_size_of(1e10)) == pytest.approx(1e10, rel=1e-13)


def test_precisions():
    assert [element_bytes(name) for name in ("f32", "bf16", "float16", "fp8", "int8", "int4")] == [
        4,
        2,
        2,
        1,
        1,
        0.5,
    ]
    assert Serving(dtype="int4").cache_dtype == "bf16"
    assert Serving(dtype="f32").cache_dtype == "f32"
    with pytest.raises(UserError, match=r"--dtype 'int3'.*int4"):
        element_bytes("int3")
