"""Bytes from the config against tensors of the real model."""

import random

import pytest
import torch
from transformers import DynamicCache

from dsmoe.accounting import (
    active_weight_bytes,
    count_parameters,
    kv_cache_bytes,
    training_memory_bytes,
    weight_bytes,
)
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_experts": 4,
}
MOA = {"num_attention_experts": 2, "qk_norm": "none", "num_attention_heads": 4}


@pytest.mark.parametrize(
    "attention", [{"num_attention_heads": 4}, {"num_attention_heads": 4, "num_key_value_heads": 1}, MOA]
)
def test_kv_cache_bytes_equal_a_real_cache(attention):
    config = DSMoEConfig(**SMALL, **attention)
    model = DSMoEForCausalLM(config).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(3, 7, dtype=torch.int64), past_key_values=cache, use_cache=True)
    held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kv_cache_bytes(config, 7, batch_size=3, dtype="float32") == held
    assert kv_cache_bytes(config, 7, batch_size=3) == held // 2


def test_weight_and_training_bytes_equal_real_tensors():
    config = DSMoEConfig(**SMALL)
    model = DSMoEForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3, dtype=torch.int64), labels=torch.zeros(1, 3, dtype=torch.int64)).loss.backward()
    optimizer.step()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters())
    moments = sum(
        state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    )
    assert weight_bytes(config, "float32") == weights
    assert training_memory_bytes(config) == weights + gradients + moments


def test_training_bytes_per_parameter():
    config = DSMoEConfig(**SMALL)
    parameters = count_parameters(config).total
    deepspeed = training_memory_bytes(
        config, dtype="bfloat16", moment_dtype="float32", master_dtype="float32"
    )
    assert deepspeed == 16 * parameters
    assert training_memory_bytes(config, "sgd_momentum") == 12 * parameters
    assert training_memory_bytes(config, "sgd", "bfloat16", gradient_dtype="float32") == 6 * parameters


def test_one_sequence_reads_the_active_weights():
    config = DSMoEConfig(**SMALL, mlp_routing={"policy": "top_k", "k": 1})
    assert active_weight_bytes(config) == 2 * count_parameters(config).active
    untied = DSMoEConfig(**SMALL, mlp_routing={"policy": "top_k", "k": 1}, tie_word_embeddings=False)
    assert (
        active_weight_bytes(untied) == 2 * count_parameters(config).active + 2 * 16
    )  # one row of the input table


def test_a_batch_reads_the_experts_that_any_of_its_sequences_keeps():
    config = DSMoEConfig(**SMALL, mlp_routing={"policy": "top_k", "k": 1})
    expert = 3 * 16 * 8
    always = 2 * count_parameters(config).total - 2 * 2 * 4 * expert
    # Monte Carlo: five sequences, each with one of four experts at random
    draw = random.Random(0)
    distinct = sum(len({draw.randrange(4) for _ in range(5)}) for _ in range(4000)) / 4000
    expected = always + 2 * 2 * distinct * expert
    assert active_weight_bytes(config, batch_size=5) == pytest.approx(expected, rel=0.01)
    assert active_weight_bytes(config, batch_size=1000) == weight_bytes(config)


def test_a_batch_reads_no_more_than_what_is_stored():
    routing = {"policy": "top_k", "k": 1}
    config = DSMoEConfig(**SMALL, mlp_routing=routing, mlp_kept_experts=[[0, 2], [1, 2, 3]])
    expert, always = 3 * 16 * 8, 2 * (count_parameters(config).total - 5 * 3 * 16 * 8)
    assert weight_bytes(config) == always + 2 * 5 * expert
    assert active_weight_bytes(config) == always + 2 * 2 * expert == 2 * count_parameters(config).active
    draw = random.Random(0)
    for batch_size in (3, 1000):
        distinct = [
            sum(len({draw.randrange(stored) for _ in range(batch_size)}) for _ in range(2000)) / 2000
            for stored in (2, 3)
        ]
        expected = always + 2 * sum(distinct) * expert
        assert active_weight_bytes(config, batch_size=batch_size) == pytest.approx(expected, rel=0.01)


def test_unknown_names_are_refused():
    config = DSMoEConfig(**SMALL)
    with pytest.raises(UserError, match="unknown dtype 'bf16'; known are float64"):
        weight_bytes(config, "bf16")
    with pytest.raises(UserError, match="unknown optimizer 'adam'"):
        training_memory_bytes(config, "adam")
