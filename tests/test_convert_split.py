"""`dsmoe split`: dense checkpoints cut into experts, against transformers' own models."""

import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.checkpoint.pretrained import load_pretrained, save_pretrained
from dsmoe.cli import main
from dsmoe.convert import assign_units
from dsmoe.convert.assignment import balanced_choice
from dsmoe.errors import UserError
from dsmoe.export.gguf.forms import gguf_architecture

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 7,
}  # fmt: skip
THETA = {"rope_type": "default", "rope_theta": 500.0}
STOCK = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"rms_norm_eps": 1e-4}),
}


def stock_model(folder, name="llama", **changes):
    config_class, model_class, fields = STOCK[name]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, "rope_parameters": THETA, **fields, **changes})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def tokens():
    return torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(1))


def split(*words):
    return main(["split", *map(str, words)])


@pytest.mark.parametrize("assignment", ["contiguous", "cluster"])
@pytest.mark.parametrize("name", STOCK)
def test_a_stock_model_and_its_split_are_one_function(tmp_path, name, assignment, capsys):
    stock = stock_model(tmp_path / "stock", name)
    capsys.readouterr()  # transformers' own saving may have DeepSpeed say something
    status = split(tmp_path / "stock", "--num-experts", 8, "--assignment", assignment, "--output", tmp_path / "out",
                   "--json")  # fmt: skip
    assert status == 0
    report = json.loads(capsys.readouterr().out)
    assert report["max_relative_difference"] < 1e-4
    model, _ = load_pretrained(tmp_path / "out", torch.float32)
    assert (model.config.kind, model.config.num_experts, model.config.moe_intermediate_size) == (
        "dsmoe",
        8,
        4,
    )
    assert model.config.eos_token_id == 7
    assert model.config.tie_word_embeddings == stock.config.tie_word_embeddings
    expected = stock(tokens()).logits
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
    # and it is no copy: every layer's routers are there and can be trained
    assert all(layer.mlp.router.weight.shape == (8, 24) for layer in model.model.layers)


def test_json_is_all_that_is_printed(tmp_path):
    stock_model(tmp_path / "stock")
    words = ["split", tmp_path / "stock", "--num-experts", "4", "--output", tmp_path / "out", "--json"]
    clean = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    result = subprocess.run(
        [sys.executable, "-m", "dsmoe.cli", *words], env=clean, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["num_experts"] == 4


@pytest.mark.parametrize("gates", ["softmax", "l2", "renormalized"])
def test_an_own_dense_twin_keeps_its_function_with_every_gate_normalisation(tmp_path, gates):
    fields = {**SIZES, "qk_norm": "full", "normalize_embeddings": True, "mlp_type": "gelu"}
    torch.manual_seed(0)
    dense = DSMoEForCausalLM(DSMoEConfig(kind="dense", num_experts=1, initializer_range=0.3, **fields)).eval()
    save_pretrained(dense, tmp_path / "dense", None)
    assert (
        split(
            tmp_path / "dense",
            "--num-experts",
            16,
            "--gate-normalization",
            gates,
            "--output",
            tmp_path / "out",
        )
        == 0
    )
    model, _ = load_pretrained(tmp_path / "out", torch.float32)
    assert model.config.normalize_embeddings
    torch.testing.assert_close(model(tokens()).logits, dense(tokens()).logits, rtol=1e-4, atol=1e-4)


def test_the_dtype_of_the_checkpoint_stays(tmp_path):
    stock = stock_model(tmp_path / "stock").to(torch.bfloat16)
    stock.save_pretrained(tmp_path / "half")
    assert split(tmp_path / "half", "--num-experts", 4, "--output", tmp_path / "out") == 0
    model = DSMoEForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    gate = model.model.layers[1].mlp.experts.gate_up_proj[:, :8].flatten(0, 1)
    assert torch.equal(gate, stock.model.layers[1].mlp.gate_proj.weight)


@pytest.mark.parametrize(
    ("name", "gates", "formats", "said"),
    [
        ("llama", "softmax", ["qwen2moe", "gguf"], "can be exported to qwen2moe and gguf"),
        ("llama", "renormalized", ["qwen2moe"], "can be exported to qwen2moe; not to gguf: "),
        ("llama", "l2", [], "with --gate-normalization softmax they can, to qwen2moe and gguf"),
        ("qwen3", "l2", [], "model.qk_norm is 'per_head'"),
        ("qwen3", "softmax", [], "model.qk_norm is 'per_head'"),
    ],
)
def test_what_it_can_be_exported_to_is_said(tmp_path, capsys, name, gates, formats, said):
    # heads of hidden_size / num_attention_heads, as the formats need them
    stock_model(tmp_path / "stock", name, head_dim=6)
    words = (
        tmp_path / "stock",
        "--num-experts",
        8,
        "--gate-normalization",
        gates,
        "--output",
        tmp_path / "out",
    )
    assert split(*words) == 0
    assert said in capsys.readouterr().out.splitlines()[-1]
    assert split(*words, "--overwrite", "--json") == 0
    assert json.loads(capsys.readouterr().out)["export_formats"] == formats
    # and it is so
    assert (
        main(
            [
                "sparsify",
                str(tmp_path / "out"),
                "--policy",
                "top_k",
                "--k",
                "3",
                "--output",
                str(tmp_path / "sparse"),
            ]
        )
        == 0
    )
    for target in ("olmoe", "qwen2moe"):
        status = main(
            ["export", str(tmp_path / "sparse"), "--format", target, "--output", str(tmp_path / target)]
        )
        assert status == (0 if target in formats else 2)
    config = load_pretrained(tmp_path / "sparse", torch.float32)[0].config
    with nullcontext() if "gguf" in formats else pytest.raises(UserError):
        gguf_architecture(config)


@pytest.mark.parametrize(("window", "status"), [(64, 0), (63, 2)])
def test_a_sliding_window_of_the_whole_context_is_none(tmp_path, capsys, window, status):
    stock = stock_model(tmp_path / "stock", "mistral", sliding_window=window)
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "out") == status
    if status:
        assert "sliding_window is 63" in capsys.readouterr().err
        return
    ids = torch.randint(61, (1, 64), generator=torch.Generator().manual_seed(3))
    model, _ = load_pretrained(tmp_path / "out", torch.float32)
    torch.testing.assert_close(model(ids).logits, stock(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_smoe_trains_with_its_k_experts(tmp_path, capsys):
    stock_model(tmp_path / "stock")
    assert (
        split(tmp_path / "stock", "--num-experts", 8, "--top-k", 3, "--output", tmp_path / "out", "--json")
        == 0
    )
    assert json.loads(capsys.readouterr().out)["max_relative_difference"] is None
    config = DSMoEConfig.from_pretrained(tmp_path / "out")
    assert config.kind == "smoe"
    assert config.routing("mlp", 1)["k"] == 3
    model, _ = load_pretrained(tmp_path / "out", torch.float32)
    assert all(layer.mlp.router.weight.std() > 0 for layer in model.model.layers)


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({}, ["--num-experts", "5"], "--num-experts 5: must divide the 32 hidden units of the MLPs"),
        ({}, ["--num-experts", "1"], "--num-experts 1"),
        ({}, ["--num-experts", "8", "--top-k", "9"], "k"),
        ({"attention_bias": True}, ["--num-experts", "8"], "attention_bias is True"),
        ({"mlp_bias": True}, ["--num-experts", "8"], "mlp_bias is True"),
        ({"hidden_act": "gelu"}, ["--num-experts", "8"], "hidden_act is 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            ["--num-experts", "8"],
            "rope_type is 'linear'",
        ),
    ],
)
def test_what_cannot_be_split_is_refused_in_a_line(tmp_path, capsys, changes, words, said):
    config_class, model_class, fields = STOCK["llama"]
    torch.manual_seed(0)
    model_class(config_class(**{"rope_parameters": THETA, **SIZES, **fields, **changes})).save_pretrained(
        tmp_path / "stock"
    )
    assert split(tmp_path / "stock", *words, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights, name: weights.pop(name), "missing keys"),
        (lambda weights, name: weights.update({name: weights[name][:-1]}), "mismatched keys"),
        (
            lambda weights, name: weights.update({name.replace("weight", "bias"): torch.ones(32)}),
            "unexpected keys",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, capsys, change, said):
    stock_model(tmp_path / "stock")
    file, name = tmp_path / "stock" / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    weights = load_file(file)
    change(weights, name)
    save_file(weights, file, metadata={"format": "pt"})
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and name.removesuffix("weight") in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "can't be read"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "can't be read"),
        ({"num_attention_heads": 5}, "can't be read"),
        ({"num_hidden_layers": "two"}, "can't be read"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_checkpoints_that_transformers_refuses_are_one_line(tmp_path, capsys, changes, said):
    stock_model(tmp_path / "stock")
    file = tmp_path / "stock" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error and str(tmp_path / "stock") in error
    assert not (tmp_path / "out").exists()


def test_other_inputs_are_refused(tmp_path, capsys):
    stock_model(tmp_path / "stock")
    assert split(tmp_path / "nowhere", "--num-experts", 8, "--output", tmp_path / "out") == 2
    assert "hf download" in capsys.readouterr().err
    words = ("--num-experts", 8, "--assignment", "cluster", "--output", tmp_path / "out")
    assert split(tmp_path / "stock", *words, "--seed", 99999999999999999999) == 2
    assert "--seed 99999999999999999999: must be" in capsys.readouterr().err
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "stock", "--overwrite") == 2
    assert "which is read" in capsys.readouterr().err
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "out") == 0
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err
    assert split(tmp_path / "out", "--num-experts", 8, "--output", tmp_path / "again") == 2
    assert "has experts already" in capsys.readouterr().err
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    (tmp_path / "stock" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert split(tmp_path / "stock", "--num-experts", 8, "--output", tmp_path / "again") == 2
    assert "'gpt2'" in capsys.readouterr().err


def greedy(similarity, capacity):
    """The definition: over all pairs, most similar first, an open place is taken."""
    units, experts = similarity.shape
    pairs = sorted(itertools.product(range(units), range(experts)), key=lambda pair: -similarity[pair].item())
    found, room = {}, [capacity] * experts
    for unit, expert in pairs:
        if unit not in found and room[expert]:
            found[unit] = expert
            room[expert] -= 1
    return [found[unit] for unit in range(units)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_the_balanced_choice_is_the_greedy_one(experts, capacity, seed):
    similarity = torch.randn(
        experts * capacity, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert balanced_choice(similarity).tolist() == greedy(similarity, capacity)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from(["contiguous", "cluster"]), st.integers(0, 10**6))
def test_every_unit_is_in_one_expert(experts, assignment, seed):
    rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(seed))
    units = assign_units(rows, experts, assignment, seed)
    assert units.shape == (experts, 16 // experts)
    assert sorted(units.flatten().tolist()) == list(range(16))
    assert torch.equal(units, units.sort(dim=1).values)


def test_planted_clusters_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=-1)
    label = torch.arange(4).repeat(8)[torch.randperm(32, generator=generator)]
    rows = centres[label] * (0.5 + torch.rand(32, 1, generator=generator))
    rows = rows + 0.02 * torch.randn(32, 32, generator=generator)
    best = min(
        sum(len(set(label[expert].tolist())) for expert in assign_units(rows, 4, "cluster", seed))
        for seed in range(5)
    )
    assert best == 4


@pytest.mark.parametrize("words", [[], ["--top-k", 2]])
def test_a_twin_whose_config_speaks_of_a_router_of_two_layers(tmp_path, words):
    torch.manual_seed(0)
    settings = {"kind": "dense", "num_experts": 1, "router_type": "mlp", "router_hidden_size": 8}
    save_pretrained(DSMoEForCausalLM(DSMoEConfig(**SIZES, **settings)), tmp_path / "dense", None)
    assert split(tmp_path / "dense", "--num-experts", 4, "--output", tmp_path / "out", *words) == 0
    model, _ = load_pretrained(tmp_path / "out", torch.float32)
    assert (model.config.router_type, model.model.layers[0].mlp.router.weight.shape) == ("linear", (4, 24))
