"""What a model is, counted over its tensors; decode speed."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from dsmoe import files
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.evaluation.parameters import describe_model
from dsmoe.evaluation.speed import decode_tokens_per_second
from dsmoe.model import DSMoEForCausalLM

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def dsmoe_model(**options):
    torch.manual_seed(0)
    return DSMoEForCausalLM(DSMoEConfig(**SIZES, intermediate_size=32, **options))


def total(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_dense_twin():
    model = dsmoe_model(kind="dense", num_experts=1)
    found = describe_model("nowhere", model)
    assert found["kind"] == "dense" and found["policy"] is None
    assert found["num_params_total"] == found["num_params_active"] == total(model)
    assert found["mlp_active_fraction"] == 1.0
    assert found["num_params_embedding"] == 50 * 16


def test_top_k_counts_k_experts():
    model = dsmoe_model(num_experts=4, mlp_routing={"policy": "top_k", "k": 1})
    found = describe_model("nowhere", model)
    assert found["kind"] == "dsmoe"
    assert found["policy"] == {"mlp": {"policy": "top_k", "k": 1}, "attention": {"policy": "dense"}}
    # of 2 layers, 3 of 4 SwiGLU experts with 8 hidden units each
    assert found["num_params_active"] == total(model) - 2 * 3 * (3 * 16 * 8)
    assert found["mlp_active_fraction"] == 0.25


def test_a_threshold_counts_only_where_it_was_measured(tmp_path):
    policies = [{"policy": "threshold", "threshold": value} for value in (0.5, 0.7)]
    model = dsmoe_model(num_experts=4, mlp_routing=policies)
    found = describe_model(tmp_path, model)
    assert found["num_params_active"] is None and found["mlp_active_fraction"] is None
    assert found["policy"]["mlp"] == policies
    measured = {
        "policy": {"mlp": policies, "attention": [{"policy": "dense"}] * 2},
        "num_params_active": 123,
        "mlp_active_fraction": 0.3,
        "attention_active_fraction": 1.0,
    }
    files.write_json(tmp_path / "sparsity.json", measured)
    found = describe_model(tmp_path, model)
    assert found["num_params_active"] == 123 and found["mlp_active_fraction"] == 0.3
    assert found["policy"] == {"mlp": policies, "attention": {"policy": "dense"}}
    assert found["num_params_total"] == total(model)
    # a report of other thresholds says nothing about this model
    stale = {**measured, "policy": {**measured["policy"], "mlp": policies[::-1]}}
    files.write_json(tmp_path / "sparsity.json", stale)
    assert describe_model(tmp_path, model)["num_params_active"] is None
    for damaged in ({}, [1], {"policy": 3}, {"policy": measured["policy"]}):
        files.write_json(tmp_path / "sparsity.json", damaged)
        with pytest.raises(UserError, match="not a report of dsmoe sparsify"):
            describe_model(tmp_path, model)


def test_other_architectures():
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=32))
    found = describe_model("nowhere", dense)
    assert found["kind"] is None and found["policy"] is None
    assert found["num_params_total"] == found["num_params_active"] == total(dense)
    assert found["num_params_embedding"] == 2 * 50 * 16
    config = OlmoeConfig(**SIZES, intermediate_size=8, num_experts=4, num_experts_per_tok=1)
    config.tie_word_embeddings = True
    moe = OlmoeForCausalLM(config)
    found = describe_model("nowhere", moe)
    assert found["num_params_total"] == total(moe)
    assert found["num_params_active"] == total(moe) - 2 * 3 * (3 * 16 * 8)
    assert found["mlp_active_fraction"] == 0.25
    assert found["num_params_embedding"] == 50 * 16


def test_decode_speed_generates_past_the_end_of_text():
    model = dsmoe_model(num_experts=4, eos_token_id=0)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # all logits equal: greedy decoding says token 0 at once
    assert decode_tokens_per_second(model, 50, prompt_length=4, new_tokens=5, repeats=1, seconds=0) > 0


def test_decode_speed_is_that_of_the_fastest_call(monkeypatch):
    durations = iter([9.0, 4.0, 1.0, 5.0, 2.0])  # the first is the warm-up; 4 + 1 + 5 reach the 10 seconds
    now = 0.0

    def clock():
        nonlocal now
        now += next(durations) if clock.running else 0.0
        clock.running = not clock.running
        return now

    clock.running = False
    monkeypatch.setattr("dsmoe.evaluation.speed.time.perf_counter", clock)
    speed = decode_tokens_per_second(
        dsmoe_model(num_experts=4), 50, prompt_length=4, new_tokens=5, repeats=1, seconds=10
    )
    assert speed == 5 / 1.0
    assert next(durations) == 2.0  # no further call


@pytest.mark.parametrize("k", [None, 3])
def test_threshold_top_k(k):
    model = dsmoe_model(num_experts=4, mlp_routing={"policy": "threshold_top_k", "threshold": 0.5, "k": k})
    fraction = describe_model("nowhere", model)["mlp_active_fraction"]
    assert fraction == (None if k is None else 0.75)
