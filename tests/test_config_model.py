"""The model's configuration: what is derived, what is refused, and that it survives saving."""

import json

import pytest
from transformers import AutoConfig

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.config.routing import check_policy, is_dense, policies_per_layer
from dsmoe.errors import UserError

PER_LAYER = [{"policy": "threshold", "threshold": 0.4871}, {"policy": "top_k", "k": 2}]


def test_derived_sizes(tiny_config):
    config = tiny_config(num_key_value_heads=None)
    assert (config.moe_intermediate_size, config.head_dim, config.num_key_value_heads) == (16, 8, 4)
    assert (
        tiny_config(num_key_value_heads=None, num_attention_experts=2, qk_norm="none").num_key_value_heads
        == 2
    )
    assert config.mlp_routing == [{"policy": "dense"}] * 2


@pytest.mark.parametrize(
    ("overrides", "mlp", "attention"),
    [
        ({}, 4.0, 2.0),
        ({"gate_normalization": "l2"}, 2.0, 2**0.5),
        ({"gate_normalization": "renormalized"}, 4.0, 2.0),
        ({"mlp_gate_scale": 1.5, "attention_gate_scale": 0.5}, 1.5, 0.5),
        (
            {
                "gate_normalization": "renormalized",
                "kind": "smoe",
                "mlp_routing": {"policy": "top_k", "k": 3},
            },
            3.0,
            2.0,
        ),
        (
            {
                "gate_normalization": "renormalized",
                "kind": "smoe",
                "mlp_routing": {"policy": "top_k", "k": 3},
                "attention_routing": {"policy": "top_k", "k": 1},
            },
            3.0,
            1.0,
        ),
        ({"kind": "smoe", "mlp_routing": {"policy": "top_k", "k": 3}}, 4.0, 2.0),
    ],
)
def test_gate_scales(tiny_config, overrides, mlp, attention):
    config = tiny_config(num_attention_experts=2, qk_norm="none", **overrides)
    assert (config.mlp_gate_scale, config.attention_gate_scale) == (mlp, attention)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kind": "sparse"}, "model.kind is 'sparse'; it must be one of dense, smoe, dsmoe"),
        ({"mlp_type": "relu"}, "model.mlp_type is 'relu'"),
        ({"hidden_size": 0}, "model.hidden_size is 0; it must be at least 1"),
        ({"num_experts": 3}, "model.intermediate_size 64 is not divisible by num_experts 3"),
        ({"moe_intermediate_size": 17}, "model.moe_intermediate_size 17 times num_experts 4"),
        ({"num_attention_heads": 5}, "model.hidden_size 32 is not divisible by num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "model.num_attention_heads 4 is not divisible by num_key_value_heads 3"),
        ({"head_dim": 7}, "model.head_dim is 7"),
        ({"num_attention_experts": 2}, "model.qk_norm 'full'"),
        ({"num_attention_experts": 4, "qk_norm": "none"}, "model.num_key_value_heads is 2"),
        ({"router_type": "mlp"}, "model.router_hidden_size is 0"),
        ({"router_hidden_size": 8}, "model.router_hidden_size is 8"),
        ({"kind": "dense"}, "model.kind 'dense' has num_experts 4"),
        ({"num_experts": 1}, "model.kind 'dsmoe' needs num_experts"),
        ({"kind": "smoe"}, "model.kind 'smoe' trains sparsely"),
        ({"mlp_gate_scale": 0.0}, "model.mlp_gate_scale is 0.0"),
        ({"mlp_routing": {"policy": "top_k", "k": 5}}, "k is 5; it must be an integer from 1 to 4"),
        ({"mlp_routing": PER_LAYER[:1]}, r"model.mlp_routing: 1 policies for 2 layers"),
        ({"mlp_routing": [*PER_LAYER, PER_LAYER[0]]}, r"model.mlp_routing: 3 policies for 2 layers"),
        ({"mlp_kept_experts": [[0]]}, "model.mlp_kept_experts: 1 entries for 2 layers"),
        ({"mlp_kept_experts": [[0], 1]}, r"model.mlp_kept_experts\[1\] is 1; it must be a list"),
        ({"mlp_kept_experts": [[], [1]]}, r"model.mlp_kept_experts\[0\] is empty"),
        ({"mlp_kept_experts": [[0, 4], [1]]}, r"mlp_kept_experts\[0\]: expert 4; .* from 0 to 3"),
        ({"mlp_kept_experts": [[0, True], [1]]}, r"mlp_kept_experts\[0\]: expert True"),
        ({"mlp_kept_experts": [[0], [2, 1]]}, r"mlp_kept_experts\[1\]: expert 1 stands after 2"),
        ({"attention_kept_experts": [[0], [1]]}, r"attention_kept_experts\[1\]: expert 1; .* from 0 to 0"),
        (
            {
                "kind": "smoe",
                "gate_normalization": "renormalized",
                "mlp_routing": {"policy": "top_p", "top_p": 0.5},
            },
            "model.mlp_gate_scale is null: with renormalized gates it is the one k of all layers",
        ),
        (
            {
                "kind": "smoe",
                "gate_normalization": "renormalized",
                "mlp_routing": [{"policy": "top_k", "k": 2}, {"policy": "top_k", "k": 3}],
            },
            "mlp_routing doesn't have; give the scale",
        ),
        (
            {"mlp_kept_experts": [[0, 1, 2], [1]], "mlp_routing": {"policy": "top_k", "k": 2}},
            r"model.mlp_routing\[1\]: k is 2, and 1 of the layer's 4 experts remain",
        ),
        (
            {
                "mlp_kept_experts": [[0, 1], None],
                "mlp_routing": {"policy": "threshold_top_k", "threshold": 1, "k": 3},
            },
            r"model.mlp_routing\[0\]: k is 3",
        ),
        (
            {"mlp_routing": [PER_LAYER[0], {"policy": "topk"}]},
            r"model.mlp_routing\[1\]: unknown policy 'topk'",
        ),
    ],
)
def test_impossible_configs(tiny_config, overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        tiny_config(**overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("dense", "is not a policy"),
        ({}, "unknown policy None"),
        ({"policy": "top_k"}, "needs 'k'"),
        ({"policy": "top_k", "k": 2, "threshold": 1.0}, "has no field 'threshold'"),
        ({"policy": "top_k", "k": True}, "k is True"),
        ({"policy": "top_k", "k": 2.0}, "k is 2.0"),
        ({"policy": "top_k", "k": 0}, "k is 0"),
        ({"policy": "threshold", "threshold": -0.1}, "threshold .* is -0.1"),
        ({"policy": "threshold", "threshold": 4.1}, "must be a number from 0 to 4"),
        ({"policy": "threshold", "threshold": float("nan")}, "is nan"),
        ({"policy": "top_p", "top_p": "0.5"}, "top_p is '0.5'"),
        ({"policy": "top_p", "top_p": 1.01}, "from 0 to 1"),
        ({"policy": ["top_k"], "k": 2}, "unknown policy"),
        ({"policy": "threshold", "threshold": [1.0] * 3}, "has 3 numbers; give one, or one for each of 4"),
        ({"policy": "threshold", "threshold": [1, 1, None, 1]}, "of expert 2 is None"),
        ({"policy": "threshold", "threshold": [1, 1, 1, 4.5]}, "of expert 3 is 4.5; .* from 0 to 4"),
        ({"policy": "threshold", "threshold": 3, "score_weights": [0.5] * 4}, "is 3; .* from 0 to 2"),
        ({"policy": "top_p", "top_p": [0.5] * 4}, "top_p is"),
        ({"policy": "dense", "score_weights": [1.0] * 4}, "has no field 'score_weights'"),
        ({"policy": "top_k", "k": 2, "score_weights": [1.0] * 3}, "score_weights: 3 numbers; .* each of 4"),
        ({"policy": "top_k", "k": 2, "score_weights": None}, "score_weights: None; give a list"),
        ({"policy": "top_k", "k": 2, "score_weights": [1, 1, 0, 1]}, "of expert 2 is 0; .* above 0"),
        ({"policy": "top_k", "k": 2, "score_weights": [1, True, 1, 1]}, "of expert 1 is True"),
        ({"policy": "top_k", "k": 2, "score_weights": [1, 1, 1, float("nan")]}, "of expert 3 is nan"),
        ({"policy": "top_p", "top_p": 0.5, "score_weights": [1, float("inf"), 1, 1]}, "expert 1 is inf"),
    ],
)
def test_bad_policies(policy, message):
    with pytest.raises(UserError, match=message):
        check_policy(policy, 4, "here")


def test_policies():
    assert check_policy({"policy": "threshold", "threshold": 1}, 4) == {
        "policy": "threshold",
        "threshold": 1.0,
    }
    filled = check_policy({"policy": "threshold_top_k", "threshold": 1}, 4)
    assert filled == {"policy": "threshold_top_k", "threshold": 1.0, "k": None}
    assert policies_per_layer(None, 3, 4, "x") == [{"policy": "dense"}] * 3
    for policy, dense in (
        ({"policy": "dense"}, True),
        ({"policy": "top_k", "k": 4}, True),
        ({"policy": "top_k", "k": 3}, False),
        ({"policy": "threshold", "threshold": 0.0}, False),
        (filled, False),
    ):
        assert is_dense(policy, 4) == dense


def test_per_expert_thresholds_and_score_weights():
    policy = {"policy": "threshold", "threshold": (1, 0, 4, 2.5), "score_weights": (1, 2, 0.5, 1)}
    checked = {
        "policy": "threshold",
        "threshold": [1.0, 0.0, 4.0, 2.5],
        "score_weights": [1.0, 2.0, 0.5, 1.0],
    }
    assert check_policy(policy, 4) == checked == json.loads(json.dumps(check_policy(checked, 4)))
    # the largest score is N * p * w
    assert check_policy({**policy, "threshold": 8}, 4)["threshold"] == 8.0
    assert "score_weights" not in check_policy({"policy": "top_k", "k": 1}, 4)


def test_kept_experts(tiny_config):
    config = tiny_config(mlp_kept_experts=[(0, 3), None], mlp_routing={"policy": "top_k", "k": 2})
    assert config.mlp_kept_experts == [[0, 3], [0, 1, 2, 3]]
    assert [config.kept_experts("mlp", layer) for layer in (0, 1)] == [[0, 3], None]
    assert [config.num_kept_experts("mlp", layer) for layer in (0, 1)] == [2, 4]
    # two of the two that remain are all of them
    assert [config.is_dense_layer("mlp", layer) for layer in (0, 1)] == [True, False]
    assert [config.kept_experts("attention", layer) for layer in (0, 1)] == [None, None]
    assert config.mlp_gate_scale == 4.0
    assert tiny_config(mlp_kept_experts=[None, [0, 1, 2, 3]]).mlp_kept_experts is None
    # k is no number above what remains where the batch decides it
    tiny_config(mlp_kept_experts=[[0], [1]], mlp_routing={"policy": "threshold_top_k", "threshold": 1.0})


def test_repeated_policies_are_no_aliases(tiny_config):
    config = tiny_config(mlp_routing={"policy": "top_k", "k": 2})
    config.mlp_routing[0]["k"] = 1
    assert config.mlp_routing[1]["k"] == 2


def test_round_trips(tiny_config, tmp_path):
    config = tiny_config(
        mlp_routing=PER_LAYER, num_attention_experts=2, qk_norm="per_head", rope_theta=5e5,
        attention_routing={"policy": "threshold", "threshold": [0.9, 0.8], "score_weights": [1.5, 0.7]},
        gate_normalization="l2", mlp_kept_experts=[[1], [0, 2, 3]], attention_kept_experts=[None, [1]],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    restored = [
        DSMoEConfig.from_dict(config.to_dict()),
        DSMoEConfig.from_dict(json.loads(config.to_json_string())),
        DSMoEConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ]
    for other in restored:
        assert isinstance(other, DSMoEConfig)
        # transformers notes where a config came from
        assert {**other.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert other.mlp_routing == PER_LAYER
        assert other.attention_routing == config.attention_routing
        assert other.attention_routing[1]["threshold"] == [0.9, 0.8]
        assert other.mlp_kept_experts == [[1], [0, 2, 3]]
        assert other.attention_kept_experts == [[0, 1], [1]]
        assert other.mlp_gate_scale == 2.0
        assert other.rope_parameters["rope_theta"] == other.rope_theta == 5e5


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope_parameters": LINEAR}, "rope_type 'linear'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention {"),
    ],
)
def test_rope_scaling_is_refused(tiny_config, fields, said):
    """The model reads theta alone: it would pass over the rest in silence."""
    with pytest.raises(UserError, match="rope_parameters has ") as caught:
        tiny_config(**fields)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_rope_without_scaling_is_taken(tiny_config):
    for rope in (
        {"rope_theta": 5e5},
        {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0},
    ):
        assert tiny_config(rope_parameters=rope).rope_theta == 5e5


def test_rope_scaling_is_refused_where_the_model_is_made(tiny_config, tmp_path):
    DSMoEForCausalLM(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="rope_type 'linear'"):
        DSMoEForCausalLM.from_pretrained(tmp_path, rope_parameters=LINEAR)


def test_fields_given_while_loading_are_checked_and_derived(tiny_config, tmp_path):
    """transformers would set them on the finished config."""
    tiny_config().save_pretrained(tmp_path)
    config = DSMoEConfig.from_pretrained(
        tmp_path, mlp_routing={"policy": "top_k", "k": 2}, rope_theta=500, use_cache=False
    )
    assert config.mlp_routing == [{"policy": "top_k", "k": 2}] * 2
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 500.0
    assert config.use_cache is False
    for bad, message in (
        ({"mlp_routing": {"policy": "top_k", "k": 99}}, "k is 99; it must be an integer from 1 to 4"),
        ({"gate_normalization": "foo"}, "model.gate_normalization is 'foo'"),
        ({"num_experts": 8}, "times num_experts 8 is not intermediate_size"),
    ):
        with pytest.raises(UserError, match=message):
            AutoConfig.from_pretrained(tmp_path, **bad)
    config, unused = DSMoEConfig.from_pretrained(tmp_path, qk_norm="none", return_unused_kwargs=True, what=1)
    assert config.qk_norm == "none" and unused == {"what": 1}


def test_whole_numbers_are_numbers(tiny_config):
    config = tiny_config(rope_theta=500000, mlp_gate_scale=16, gate_constant=0)
    assert (config.rope_theta, config.mlp_gate_scale, config.gate_constant) == (5e5, 16.0, 0.0)
    assert all(isinstance(value, float) for value in (config.rope_theta, config.mlp_gate_scale))
    assert config.to_dict() == tiny_config(rope_theta=5e5, mlp_gate_scale=16.0).to_dict()
