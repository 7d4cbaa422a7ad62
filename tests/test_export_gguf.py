"""`dsmoe export --format gguf`: the file gives the original's logits; what llama.cpp cannot hold is refused."""

import json

import pytest
import torch

from dsmoe import DSMoEConfig, DSMoEForCausalLM, cli
from dsmoe.checkpoint import save_pretrained
from dsmoe.data.tokenization import save_tokenizer, train_tokenizer
from dsmoe.errors import UserError
from dsmoe.export import export
from dsmoe.export.gguf import engine, read, tensors, write
from dsmoe.export.gguf.tensors import interleave_rotary, repeat_heads

gguf = pytest.importorskip("gguf")

VOCAB = 300
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
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
    "pad_token_id": None,
}
TOP2 = {"mlp_routing": {"policy": "top_k", "k": 2}}
DENSE = {"kind": "dense", "num_experts": 1}
FORMS = [
    ("olmoe", {"qk_norm": "full", **TOP2}),
    ("qwen2moe", {"qk_norm": "none", **TOP2}),
    ("llama", {"qk_norm": "none", **DENSE}),
    ("olmoe", {"qk_norm": "full", **DENSE}),
]


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    # tests/test_export_gguf_engine.py runs it; here the reading back alone must find the faults
    monkeypatch.setattr(engine, "load_engine", lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["the quick brown fox"] * 9, 270), folder)
    return folder


def saved(folder, tokenizer_dir=None, dtype=torch.float32, **changed):
    torch.manual_seed(0)
    model = DSMoEForCausalLM(DSMoEConfig(**{**SIZES, **changed})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    save_pretrained(model.to(dtype), folder, tokenizer_dir)
    return model


def logits(model):
    tokens = torch.randint(VOCAB, (3, 40), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        return model(tokens).logits


def value(reader, key):
    return reader.fields[key].contents()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "changed"), FORMS)
def test_file_equals_original(tmp_path, architecture, changed, tied):
    original = saved(tmp_path / "source", tie_word_embeddings=tied, mlp_gate_scale=2.7, **changed)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert (report["architecture"], report["dtype"], report["tokenizer"]) == (architecture, "float32", None)
    assert report["max_abs_logit_difference"] < 1e-4
    assert report["llama_cpp"] is None
    loaded = read.read_gguf(gguf, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(loaded), logits(original), atol=1e-4, rtol=1e-4)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert value(reader, "tokenizer.ggml.model") == "no_vocab"
    assert value(reader, f"{architecture}.vocab_size") == VOCAB
    assert value(reader, f"{architecture}.rope.freq_base") == 500.0
    # llama.cpp's olmoe has as many key-value heads as query heads
    assert value(reader, f"{architecture}.attention.head_count_kv") == (4 if architecture == "olmoe" else 2)
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output.weight"} <= names
    if architecture != "llama":
        experts = 4 if changed is not FORMS[3][1] else 1
        assert value(reader, f"{architecture}.expert_count") == experts
        assert value(reader, f"{architecture}.expert_used_count") == min(2, experts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_short_types_keep_norms_and_routers(tmp_path, dtype):
    original = saved(tmp_path / "source", **TOP2)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf", dtype)
    assert any("near tie" in note for note in report["notes"])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    short = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    for name, kind in kinds.items():
        assert kind == ("F32" if "norm" in name or "gate_inp" in name else short), name
    stored = {tensor.name: tensor for tensor in reader.tensors}["blk.1.ffn_gate_inp.weight"].data
    assert torch.equal(torch.from_numpy(stored.copy()), original.model.layers[1].mlp.router.weight)


def test_normalised_embeddings_are_folded_and_untied(tmp_path):
    original = saved(tmp_path / "source", normalize_embeddings=True, **TOP2)
    export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    loaded = read.read_gguf(gguf, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(loaded), logits(original), atol=1e-4, rtol=1e-4)
    assert torch.equal(loaded.lm_head.weight, original.lm_head.weight)
    report = export(tmp_path / "source", "gguf", tmp_path / "short.gguf", "bfloat16")
    assert any("inexact" in note for note in report["notes"])


def test_expert_as_wide_as_the_residual_stream(tmp_path):
    # F == D: a forgotten transposition fits in shape
    original = saved(tmp_path / "source", intermediate_size=128, **TOP2)
    export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    loaded = read.read_gguf(gguf, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(loaded), logits(original), atol=1e-4, rtol=1e-4)


def test_rows_of_a_head_are_interleaved():
    rows = torch.arange(12.0)[:, None].expand(12, 3)
    # two heads of three pairs: row i goes with row i + 3
    expected = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert interleave_rotary(rows, 2)[:, 0].tolist() == expected


def test_heads_are_repeated_in_place():
    rows = torch.arange(8.0)[:, None].expand(8, 3)
    expected = [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert repeat_heads(rows, 2, 2)[:, 0].tolist() == expected
    assert repeat_heads(rows[:, 0], 2, 2).tolist() == expected


@pytest.mark.parametrize("heads", [1, 4])
def test_key_value_heads_of_olmoe(tmp_path, heads):
    original = saved(tmp_path / "source", num_key_value_heads=heads, **TOP2)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert any("key-value heads" in note for note in report["notes"]) == (heads == 1)
    loaded = read.read_gguf(gguf, tmp_path / "model.gguf")
    torch.testing.assert_close(logits(loaded), logits(original), atol=1e-4, rtol=1e-4)


def test_tokenizer_goes_along(tmp_path, tokenizer_dir):
    saved(tmp_path / "source", tokenizer_dir, **TOP2)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert report["tokenizer"] == {"pre": "gpt-2", "tokens": VOCAB}
    assert any("[PAD...]" in note for note in report["notes"])
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.ggml.tokens")[0] == "<|endoftext|>"
    without = export(tmp_path / "source", "gguf", tmp_path / "bare.gguf", tokenizer=False)
    assert without["tokenizer"] is None
    assert any("token ids alone" in note for note in without["notes"])


REFUSED = [
    ({"qk_norm": "per_head"}, "qk_norm is 'per_head'"),
    ({"gate_normalization": "renormalized", **TOP2}, "llama.cpp does not divide the gates of OLMoE"),
    ({"gate_normalization": "renormalized", "qk_norm": "none", **TOP2}, "the gates of Qwen2-MoE"),
    ({"gate_normalization": "l2"}, "by nothing: train with 'softmax';"),
    ({"mlp_routing": {"policy": "threshold", "threshold": 0.5}}, "llama.cpp would run it as OLMoE"),
    ({"mlp_routing": [{"policy": "top_k", "k": 2}, {"policy": "top_k", "k": 3}]}, "K = 2, 3"),
    ({"mlp_kept_experts": [[2], None]}, "stores 1 of 4 experts"),
    ({"qk_norm": "none", "num_attention_experts": 2, "num_key_value_heads": 2}, "mixture of attention heads"),
    ({"head_dim": 16}, "head_dim is 16"),
    ({"mlp_type": "gelu"}, "'swiglu' alone"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_refusals_say_why_and_leave_nothing(tmp_path, changed, message):
    saved(tmp_path / "source", **changed)
    with pytest.raises(UserError) as caught:
        export(tmp_path / "source", "gguf", tmp_path / "new" / "model.gguf")
    assert message in str(caught.value)
    assert "llama.cpp" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_renormalised_gates_of_all_experts_are_plain_ones(tmp_path):
    saved(tmp_path / "source", gate_normalization="renormalized")
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert any("all 4 experts" in note for note in report["notes"])


def swapped(first, second):
    def damage(pairs):
        found = dict(pairs)
        found[first], found[second] = found[second], found[first]
        return found.items()

    return damage


def changed_tensor(name, change):
    return lambda pairs: [(n, change(v) if n == name else v) for n, v in pairs]


DAMAGE = {
    "gate_up": swapped("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"),
    "layers": swapped("blk.0.attn_q.weight", "blk.1.attn_q.weight"),
    "norms": swapped("blk.1.attn_norm.weight", "blk.1.ffn_norm.weight"),
    "transposed": changed_tensor("blk.1.ffn_down_exps.weight", lambda v: v.transpose(1, 2).contiguous()),
    "unscaled": changed_tensor("blk.1.ffn_down_exps.weight", lambda v: v / 4),
    "permuted": changed_tensor("blk.0.attn_k.weight", lambda v: interleave_rotary(v, 2)),
    "missing": lambda pairs: [pair for pair in pairs if pair[0] != "output.weight"],
    "superfluous": lambda pairs: [*pairs, ("rope_freqs.weight", torch.ones(4))],
    "shape": changed_tensor("blk.0.attn_v.weight", lambda v: v[:-1].contiguous()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_file_is_caught(tmp_path, monkeypatch, damage):
    # as wide as the residual stream, so that a transposition fits
    saved(tmp_path / "source", intermediate_size=128, **TOP2)
    (tmp_path / "model.gguf").write_bytes(b"kept")
    correct = tensors.gguf_tensors
    monkeypatch.setattr(tensors, "gguf_tensors", lambda model: DAMAGE[damage](correct(model)))
    with pytest.raises(UserError, match=r"differs from the original|read back"):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf", overwrite=True)
    assert (tmp_path / "model.gguf").read_bytes() == b"kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]


def test_a_forgotten_permutation_is_caught(tmp_path, monkeypatch):
    saved(tmp_path / "source", qk_norm="none", **DENSE)
    monkeypatch.setattr(tensors, "interleave_rotary", lambda weight, _: weight)
    with pytest.raises(UserError, match="differs from the original"):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("num_experts_per_tok", 3), ("rms_norm_eps", 1e-2), ("rope_parameters", {"rope_theta": 10000.0})],
)
def test_a_wrong_hyper_parameter_is_caught(tmp_path, monkeypatch, name, wrong):
    saved(tmp_path / "source", **TOP2)
    correct = write.add_hyper_parameters

    def damaged(writer, config):
        setattr(config, name, wrong)
        correct(writer, config)

    monkeypatch.setattr(write, "add_hyper_parameters", damaged)
    with pytest.raises(UserError, match="differs from the original"):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf")


def test_a_weight_beyond_float16_is_refused(tmp_path):
    model = saved(tmp_path / "source", **TOP2)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0, 0, 0] = 1e6
    save_pretrained(model, tmp_path / "large", None)
    with pytest.raises(UserError, match="differs from the original"):
        export(tmp_path / "large", "gguf", tmp_path / "model.gguf", "float16")


def test_dtype_follows_the_checkpoint(tmp_path):
    saved(tmp_path / "source", dtype=torch.bfloat16, **TOP2)
    assert export(tmp_path / "source", "gguf", tmp_path / "model.gguf")["dtype"] == "bfloat16"


def test_command(tmp_path, tokenizer_dir, capsys):
    saved(tmp_path / "source", tokenizer_dir, **TOP2)
    arguments = ["export", str(tmp_path / "source"), "--format", "gguf", "--output"]
    assert cli.main([*arguments, str(tmp_path / "folder")]) == 2
    assert "MODEL.gguf" in capsys.readouterr().err
    assert cli.main([*arguments, str(tmp_path / "model.gguf")]) == 0
    printed = capsys.readouterr().out
    for words in ("GGUF, olmoe in float32", "300 tokens, pre gpt-2", "llama-cpp-python is not installed"):
        assert words in printed
    assert cli.main([*arguments, str(tmp_path / "model.gguf")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (
        cli.main([*arguments, str(tmp_path / "model.gguf"), "--overwrite", "--no-tokenizer", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert (report["format"], report["tokenizer"]) == ("gguf", None)
    assert report["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "source"]
    assert (
        cli.main([*arguments[:2], "--format", "olmoe", "--no-tokenizer", "--output", str(tmp_path / "out")])
        == 2
    )
    assert "--no-tokenizer is for" in capsys.readouterr().err
    assert (
        cli.main(
            [*arguments[:2], "--format", "olmoe", "--dtype", "float16", "--output", str(tmp_path / "out")]
        )
        == 2
    )
    assert "float32, bfloat16" in capsys.readouterr().err


def test_without_the_package(tmp_path, monkeypatch):
    saved(tmp_path / "source", **TOP2)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match="pip install"):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
