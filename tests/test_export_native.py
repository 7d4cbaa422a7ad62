"""`dsmoe export`: the native model gives the original's logits; what it cannot hold is refused, and leaves nothing."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OlmoeForCausalLM, Qwen2MoeForCausalLM

from dsmoe import DSMoEConfig, DSMoEForCausalLM, cli
from dsmoe.checkpoint import save_pretrained
from dsmoe.errors import UserError
from dsmoe.export import export, targets, write
from dsmoe.files import sha256

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-4,
    # far above 0.02, so that routers choose sharply
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
DENSE = {"kind": "dense", "num_experts": 1}
QK_NORM = {"olmoe": "full", "qwen2moe": "none", "llama": "none", "dsmoe": "full"}


def make(**changed):
    torch.manual_seed(0)
    model = DSMoEForCausalLM(DSMoEConfig(**{**SIZES, **changed})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def top_k(k):
    return {"policy": "top_k", "k": k}


def saved(folder, **changed):
    model = make(**changed)
    save_pretrained(model, folder, None)
    return model


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).logits


def tokens(batch=3, length=40, seed=7):
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_equal_models(original, folder):
    """Logits and greedy continuations of a folder loaded without any code of this project."""
    native = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).eval()
    assert not type(native).__module__.startswith("dsmoe")
    torch.testing.assert_close(logits(native, tokens()), logits(original, tokens()), atol=1e-5, rtol=1e-5)
    prompt = tokens(2, 5)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert native.generate(prompt, **options).tolist() == original.generate(prompt, **options).tolist()
    return native


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("gates", ["softmax", "renormalized"])
@pytest.mark.parametrize("target", ["olmoe", "qwen2moe"])
def test_native_model_equals_original(tmp_path, target, gates, k, tied):
    original = saved(
        tmp_path / "source",
        qk_norm=QK_NORM[target],
        gate_normalization=gates,
        mlp_routing=top_k(k),
        tie_word_embeddings=tied,
    )
    report = export(tmp_path / "source", target, tmp_path / "out")
    native = assert_equal_models(original, tmp_path / "out")
    config = native.config
    assert (config.num_experts, config.num_experts_per_tok) == (4, k)
    assert config.norm_topk_prob == (gates == "renormalized")
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (0, 1, None)
    assert config.tie_word_embeddings == tied
    assert report["max_abs_logit_difference"] < 1e-5
    assert report["argmax_agreement"] == 1.0


@pytest.mark.parametrize("target", ["olmoe", "qwen2moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_untied_export(tmp_path, target, tied):
    original = saved(
        tmp_path / "source", qk_norm=QK_NORM[target], mlp_routing=top_k(2), tie_word_embeddings=tied
    )
    report = export(tmp_path / "source", target, tmp_path / "out", untie=True)
    native = assert_equal_models(original, tmp_path / "out")
    assert native.config.tie_word_embeddings is False
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert not any("--untie" in note for note in report["notes"])


def test_shared_expert_is_zero_and_its_gate_reads_a_channel(tmp_path):
    original = saved(tmp_path / "source", qk_norm="none", mlp_routing=top_k(2))
    export(tmp_path / "source", "qwen2moe", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.shared_expert"
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert not weights[f"{prefix}.{name}.weight"].any()
        # silu(x) / x, which llama.cpp computes for its sigmoid, is not a number at x = 0
        normed = original.model.layers[layer].post_attention_layernorm(torch.randn(50, 32))
        x = normed @ weights[f"{prefix}_gate.weight"].T
        assert torch.isfinite(torch.nn.functional.silu(x) / x).all()


def test_notes_on_other_engines(tmp_path):
    saved(tmp_path / "source", mlp_routing=top_k(2), gate_normalization="renormalized")
    notes = "\n".join(export(tmp_path / "source", "olmoe", tmp_path / "out")["notes"])
    for word in ("norm_topk_prob", "--untie", "rms_norm_eps is 0.0001"):
        assert word in notes


@pytest.mark.parametrize("target", ["olmoe", "qwen2moe"])
@pytest.mark.parametrize("tied", [True, False])
def test_normalised_embeddings_are_folded(tmp_path, target, tied):
    original = saved(
        tmp_path / "source",
        qk_norm=QK_NORM[target],
        normalize_embeddings=True,
        tie_word_embeddings=tied,
        mlp_routing=top_k(2),
    )
    export(tmp_path / "source", target, tmp_path / "out")
    native = assert_equal_models(original, tmp_path / "out")
    assert native.config.tie_word_embeddings is False
    torch.testing.assert_close(native.lm_head.weight, original.lm_head.weight, atol=0, rtol=0)


@pytest.mark.parametrize("target", ["olmoe", "qwen2moe"])
def test_expert_as_wide_as_the_residual_stream(tmp_path, target):
    # F == D: a forgotten transposition of down_proj fits in shape
    original = saved(
        tmp_path / "source", qk_norm=QK_NORM[target], intermediate_size=128, mlp_routing=top_k(2)
    )
    assert original.model.layers[0].mlp.experts.down_proj.shape == (4, 32, 32)
    export(tmp_path / "source", target, tmp_path / "out")
    assert_equal_models(original, tmp_path / "out")


@pytest.mark.parametrize("target", ["olmoe", "llama"])
@pytest.mark.parametrize("normalised", [True, False])
def test_dense_twin(tmp_path, target, normalised):
    original = saved(
        tmp_path / "source",
        **DENSE,
        qk_norm=QK_NORM[target],
        normalize_embeddings=normalised,
        # no gates: a scale must not be folded
        mlp_gate_scale=3.0,
    )
    export(tmp_path / "source", target, tmp_path / "out")
    assert_equal_models(original, tmp_path / "out")


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": "smoe", "gate_normalization": "renormalized", "mlp_routing": top_k(2)},
        {"mlp_gate_scale": 2.7, "mlp_routing": {"policy": "threshold_top_k", "threshold": 0.4, "k": 3}},
        # equal weights choose as none do, and of all experts there is nothing to choose
        {"mlp_routing": {**top_k(2), "score_weights": [0.5] * 4}},
        {"mlp_routing": [{"policy": "dense"}, {**top_k(4), "score_weights": [1.0, 2.0, 0.5, 1.0]}]},
        # the same K by three policies
        {"mlp_routing": [{"policy": "dense"}, top_k(4)]},
    ],
)
def test_other_ways_to_one_k(tmp_path, changed):
    original = saved(tmp_path / "source", **changed)
    export(tmp_path / "source", "olmoe", tmp_path / "out")
    assert_equal_models(original, tmp_path / "out")


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    data=st.data(),
    target=st.sampled_from(["olmoe", "qwen2moe"]),
    num_experts=st.integers(2, 7),
    width=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 4)]),
    gates=st.sampled_from(["softmax", "renormalized"]),
)
def test_weights_for_any_sizes(data, target, num_experts, width, heads, gates):
    model = make(
        num_experts=num_experts,
        intermediate_size=num_experts * width,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        qk_norm=QK_NORM[target],
        gate_normalization=gates,
        mlp_routing=top_k(data.draw(st.integers(1, num_experts))),
    )
    native_class = OlmoeForCausalLM if target == "olmoe" else Qwen2MoeForCausalLM
    native = native_class(targets.target_config(model.config, target)).eval()
    native.set_experts_implementation("eager")
    native.load_state_dict(targets.target_weights(model, target, torch.float32), strict=True)
    torch.testing.assert_close(logits(native, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-5)


def test_bfloat16_with_a_power_of_two_is_the_cast_alone(tmp_path):
    original = saved(tmp_path / "source", mlp_routing=top_k(2))
    report = export(tmp_path / "source", "olmoe", tmp_path / "out", "bfloat16")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert native.dtype == torch.bfloat16
    rounded = original.to(torch.bfloat16).float()
    torch.testing.assert_close(
        logits(native.float(), tokens()), logits(rounded, tokens()), atol=1e-5, rtol=1e-5
    )
    assert not any("power of two" in note for note in report["notes"])


@pytest.mark.parametrize("changed", [{"mlp_gate_scale": 2.7}, {"normalize_embeddings": True}])
def test_bfloat16_after_inexact_folding_is_noted(tmp_path, changed):
    original = saved(tmp_path / "source", mlp_routing=top_k(2), **changed)
    report = export(tmp_path / "source", "olmoe", tmp_path / "out", "bfloat16")
    assert any("power of two" in note for note in report["notes"])
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # the product is taken in float32 and rounded once
    scale = original.config.mlp_gate_scale
    expected = (original.model.layers[1].mlp.experts.down_proj.transpose(1, 2) * scale).bfloat16().float()
    # without the padding
    assert torch.equal(native.model.layers[1].mlp.experts.down_proj[..., :12], expected)


def test_native_copy_keeps_every_policy(tmp_path):
    original = saved(
        tmp_path / "source",
        qk_norm="per_head",
        num_attention_experts=2,
        mlp_type="gelu",
        gate_normalization="l2",
        mlp_routing=[
            {"policy": "threshold", "threshold": [0.7, 0.1, 1.4, 0.9], "score_weights": [1.0, 2.0, 0.5, 1.0]},
            top_k(3),
        ],
        mlp_kept_experts=[[0, 3], None],
        attention_kept_experts=[None, [1]],
    )
    (tmp_path / "source" / "sparsity.json").write_text("{}\n")
    report = export(tmp_path / "source", "dsmoe", tmp_path / "out", "bfloat16")
    assert report["max_abs_logit_difference"] == 0.0
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", trust_remote_code=False)
    assert (copy.dtype, copy.config.mlp_routing) == (torch.bfloat16, original.config.mlp_routing)
    assert copy.config.mlp_kept_experts == [[0, 3], [0, 1, 2, 3]]
    assert copy.config.attention_kept_experts == [[0, 1], [1]]
    for file in ("dsmoe_shim.py", "sparsity.json", "export.json"):
        assert (tmp_path / "out" / file).exists()
    assert "auto_map" in json.loads((tmp_path / "out" / "config.json").read_text())


PER_EXPERT = {"policy": "threshold", "threshold": [0.5, 1.0, 0.2, 0.7]}
WEIGHTED = {**top_k(2), "score_weights": [1.0, 2.0, 0.5, 1.0]}
REFUSED = [
    ("olmoe", {"qk_norm": "none"}, "--format qwen2moe"),
    ("olmoe", {"qk_norm": "none", **DENSE}, "--format llama"),
    ("olmoe", {"qk_norm": "per_head"}, "--format dsmoe"),
    ("qwen2moe", {"qk_norm": "full"}, "--format olmoe"),
    ("qwen2moe", {"qk_norm": "none", **DENSE}, "--format llama"),
    ("llama", {"qk_norm": "none"}, "--format qwen2moe"),
    ("llama", {"qk_norm": "full", **DENSE}, "--format olmoe"),
    ("olmoe", {"head_dim": 16}, "head_dim is 16"),
    ("olmoe", {"pad_token_id": VOCAB}, "pad_token_id is 64"),
    ("olmoe", {"mlp_type": "gelu"}, "'swiglu' alone"),
    ("olmoe", {"router_type": "mlp", "router_hidden_size": 8}, "linear router"),
    ("olmoe", {"gate_normalization": "l2"}, "'softmax' or 'renormalized'"),
    (
        "qwen2moe",
        {"qk_norm": "none", "num_attention_experts": 2, "num_key_value_heads": 2},
        "mixture of attention heads",
    ),
    ("olmoe", {"mlp_routing": {"policy": "threshold", "threshold": 0.5}}, "dsmoe sparsify CHECKPOINT"),
    ("olmoe", {"mlp_routing": {"policy": "top_p", "top_p": 0.5}}, "from token to token"),
    ("olmoe", {"mlp_routing": {"policy": "threshold_top_k", "threshold": 0.5}}, "dsmoe sparsify CHECKPOINT"),
    ("olmoe", {"mlp_routing": [top_k(2), top_k(3)]}, "K = 2, 3"),
    ("olmoe", {"mlp_routing": [top_k(2), {"policy": "dense"}]}, "K = 2, 4"),
    ("olmoe", {"mlp_routing": [top_k(2), top_k(3)]}, "model.mlp_routing[1] 3"),
    (
        "olmoe",
        {"mlp_routing": [top_k(2), PER_EXPERT]},
        "model.mlp_routing[1] is policy 'threshold' with one threshold",
    ),
    ("olmoe", {"mlp_routing": [top_k(2), WEIGHTED]}, "model.mlp_routing[1] has score_weights"),
    (
        "olmoe",
        {"mlp_routing": {"policy": "top_p", "top_p": 0.5, "score_weights": [1, 2, 1, 1]}},
        "with score_weights",
    ),
    (
        "qwen2moe",
        {"qk_norm": "none", "mlp_routing": top_k(2), "mlp_kept_experts": [None, [0, 1, 3]]},
        "model.mlp_kept_experts[1] stores 3 of 4 experts",
    ),
    ("olmoe", {"mlp_kept_experts": [[2], None]}, "model.mlp_kept_experts[0] stores 1 of 4 experts"),
]


@pytest.mark.parametrize(("target", "changed", "message"), REFUSED)
def test_refusals_say_why_and_leave_nothing(tmp_path, target, changed, message):
    saved(tmp_path / "source", **{"mlp_routing": None, **changed})
    with pytest.raises(UserError) as caught:
        export(tmp_path / "source", target, tmp_path / "new" / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("damage", ["transposed", "unscaled", "one_expert"])
def test_a_wrong_export_is_caught(tmp_path, monkeypatch, damage):
    saved(tmp_path / "source", intermediate_size=128, mlp_routing=top_k(2))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    correct = targets.target_model

    @torch.no_grad()
    def damaged(*args, **options):
        made = correct(*args, **options)
        experts = made.model.layers[1].mlp.experts
        if damage == "transposed":
            experts.down_proj.copy_(experts.down_proj.transpose(1, 2).clone())
        elif damage == "unscaled":
            experts.down_proj.div_(4)
        else:
            experts.down_proj[2] = experts.down_proj[1].clone()
        return made

    monkeypatch.setattr(write, "target_model", damaged)
    with pytest.raises(UserError, match="differs from the original"):
        export(tmp_path / "source", "olmoe", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert (tmp_path / "out" / "kept.txt").read_text() == "kept"


def test_folders_are_protected(tmp_path):
    saved(tmp_path / "run" / "final", mlp_routing=top_k(2))
    for output in (tmp_path / "run" / "final", tmp_path / "run"):
        with pytest.raises(UserError, match="which is read"):
            export(tmp_path / "run", "olmoe", output, overwrite=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    with pytest.raises(UserError, match="--overwrite"):
        export(tmp_path / "run", "olmoe", tmp_path / "out")
    export(tmp_path / "run", "olmoe", tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "file").exists()
    (tmp_path / "plain").write_text("")
    with pytest.raises(UserError, match="is a file"):
        export(tmp_path / "run", "olmoe", tmp_path / "plain", overwrite=True)


def test_command_line(tmp_path, capsys):
    saved(tmp_path / "source", mlp_routing=top_k(2), dtype="bfloat16")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    arguments = ["export", str(tmp_path / "source"), "--format", "olmoe", "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert printed.err == ""
    assert report == json.loads((tmp_path / "out" / "export.json").read_text())
    assert report["source_config_sha256"] == sha256(tmp_path / "source" / "config.json")
    assert report["dtype"] == "float32"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert str(tmp_path) not in (tmp_path / "out" / "export.json").read_text()
    assert cli.main([*arguments, "--format", "dsmoe", "--untie"]) == 2
    assert "--untie" in capsys.readouterr().err
    assert cli.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite", "--dtype", "bfloat16"]) == 0
    assert "near tie" in capsys.readouterr().out


def test_dtype_follows_the_checkpoint(tmp_path):
    model = make(mlp_routing=top_k(2)).to(torch.bfloat16)
    save_pretrained(model, tmp_path / "source", None)
    assert export(tmp_path / "source", "olmoe", tmp_path / "out")["dtype"] == "bfloat16"


def test_a_native_copy_of_a_float16_checkpoint_stays_float16(tmp_path):
    """transformers' own architectures are not checked in float16, and take float32."""
    model = make(mlp_routing=top_k(2)).to(torch.float16)
    save_pretrained(model, tmp_path / "source", None)
    assert export(tmp_path / "source", "dsmoe", tmp_path / "copy")["dtype"] == "float16"
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "copy"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)
    assert export(tmp_path / "source", "olmoe", tmp_path / "olmoe")["dtype"] == "float32"
    with pytest.raises(UserError, match="dtype 'float16': must be one of float32, bfloat16"):
        export(tmp_path / "source", "olmoe", tmp_path / "half", "float16")


def test_generation_settings_are_carried_over(tmp_path):
    model = make(mlp_routing=top_k(2))
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    save_pretrained(model, tmp_path / "source", None)
    export(tmp_path / "source", "olmoe", tmp_path / "out")
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert native.generation_config.temperature == 0.7
    assert native.generation_config.eos_token_id == 0


@pytest.mark.parametrize(
    ("dtype", "width"), [("bfloat16", 4), ("bfloat16", 12), ("float32", 90), ("float32", 3)]
)
@pytest.mark.parametrize("target", ["olmoe", "qwen2moe"])
def test_experts_are_padded_for_the_default_kernel(tmp_path, target, dtype, width):
    original = saved(
        tmp_path / "source", qk_norm=QK_NORM[target], intermediate_size=4 * width, mlp_routing=top_k(2)
    )
    report = export(tmp_path / "source", target, tmp_path / "out", dtype)
    padded = -(-width // 8) * 8
    assert any(f"from {width} to {padded} hidden units" in note for note in report["notes"])
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert native.config._experts_implementation == "grouped_mm"
    field = "intermediate_size" if target == "olmoe" else "moe_intermediate_size"
    assert getattr(native.config, field) == padded
    found = logits(native, tokens())  # did not run before
    assert torch.isfinite(found).all()
    weights = native.model.layers[1].mlp.experts
    gate, up = weights.gate_up_proj.chunk(2, dim=1)
    assert not any(part.any() for part in (gate[:, width:], up[:, width:], weights.down_proj[..., width:]))
    # the function of the unpadded one: in float32, as the rounding of the weights is the same
    rounded = original.to(native.dtype).float()
    torch.testing.assert_close(
        logits(native.float(), tokens()), logits(rounded, tokens()), atol=1e-5, rtol=1e-5
    )


def test_a_hidden_size_that_the_default_kernel_refuses_is_noted(tmp_path):
    sizes = {"hidden_size": 36, "num_attention_heads": 2, "num_key_value_heads": 2}
    saved(tmp_path / "source", mlp_routing=top_k(2), **sizes)
    notes = {}
    for dtype in ("bfloat16", "float32"):
        report = export(tmp_path / "source", "olmoe", tmp_path / dtype, dtype)
        notes[dtype] = [note for note in report["notes"] if "eager" in note]
    assert len(notes["bfloat16"]) == 1 and "hidden_size 36" in notes["bfloat16"][0]
    assert notes["float32"] == []


def test_a_default_kernel_that_gives_other_logits_is_caught(tmp_path, monkeypatch):
    from transformers.integrations import moe

    saved(tmp_path / "source", mlp_routing=top_k(2))
    grouped = moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(
        moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", lambda *args: grouped(*args) * 1.1
    )
    with pytest.raises(UserError, match="differs from the original"):
        export(tmp_path / "source", "olmoe", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
