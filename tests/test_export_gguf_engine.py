"""GGUF files in llama.cpp itself: logits, token by token and at once, and token ids equal the original's.

Needs llama-cpp-python (built from source, some 20 minutes), so that most machines skip it.
"""

import itertools

import pytest
import torch
from test_export_gguf_tokenizer import EOS, SHARED
from test_export_gguf_tokenizer import saved as saved_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.checkpoint import save_pretrained
from dsmoe.errors import UserError
from dsmoe.export import export
from dsmoe.export.gguf import engine, pretokenizers, tensors
from dsmoe.export.gguf.engine import BOUNDS, TEXTS, engine_logits, load_engine

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

VOCAB, LENGTH = 600, 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-4,
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


def saved(folder, tokenizer_dir=None, **changed):
    torch.manual_seed(0)
    model = DSMoEForCausalLM(DSMoEConfig(**{**SIZES, **changed})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            if ".router." in name:
                parameter.mul_(4)
    save_pretrained(model, folder, tokenizer_dir)
    return model


def tokens(batch=4):
    return torch.randint(VOCAB, (batch, LENGTH), generator=torch.Generator().manual_seed(7))


def log_probs(model):
    with torch.inference_mode():
        return model(tokens()).logits.log_softmax(-1)


def engine_log_probs(path, batch=None):
    llama = load_engine(path, LENGTH)
    try:
        return engine_logits(llama, tokens(), batch).log_softmax(-1)
    finally:
        llama.close()


@pytest.mark.parametrize("batch", [None, 7, 1])
@pytest.mark.parametrize(("architecture", "changed"), FORMS)
def test_log_probabilities(tmp_path, architecture, changed, batch):
    original = saved(tmp_path / "source", **changed)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert report["architecture"] == architecture
    assert report["llama_cpp"]["mean_abs_logp_difference"] < 1e-3
    difference = (engine_log_probs(tmp_path / "model.gguf", batch) - log_probs(original)).abs()
    assert difference.mean() <= BOUNDS["float32"]
    assert difference.max() < 0.05


@pytest.mark.parametrize(("architecture", "changed"), FORMS[:2])
def test_experts_matter(tmp_path, architecture, changed):
    # a test that could not tell the kept experts apart would show nothing
    kept = log_probs(saved(tmp_path / "source", **changed))
    saved(tmp_path / "other", **{**changed, "mlp_routing": {"policy": "top_k", "k": 3}})
    export(tmp_path / "other", "gguf", tmp_path / "model.gguf")
    assert (engine_log_probs(tmp_path / "model.gguf") - kept).abs().mean() > 20 * BOUNDS["float32"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("architecture", "changed"), FORMS)
def test_short_types(tmp_path, architecture, changed, dtype):
    saved(tmp_path / "source", **changed)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf", dtype)
    assert report["architecture"] == architecture
    assert report["llama_cpp"]["mean_abs_logp_difference"] <= BOUNDS[dtype]


@pytest.mark.parametrize("damage", ["logits", "tokens"])
def test_what_llama_cpp_alone_shows_is_refused(tmp_path, monkeypatch, damage):
    folder = saved_tokenizer(tmp_path / "tokenizer", trained("gpt-2", SHARED[0][1], False))
    saved(tmp_path / "source", folder, qk_norm="none", **DENSE)
    if damage == "tokens":
        monkeypatch.setattr("dsmoe.export.gguf.tokenizer.pretokenizer_name", lambda _: "qwen2")
        message = "other tokens"
    else:
        # both sides of this project agree on the wrong order of rows
        monkeypatch.setattr(tensors, "interleave_rotary", lambda weight, _: weight)
        monkeypatch.setattr("dsmoe.export.gguf.read._halves_together", lambda rows, _: rows)
        message = "other logits"
    with pytest.raises(UserError, match=message):
        export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "tokenizer"]


def trained(name, pre_tokenizer, ignore_merges):
    """A BPE whose merges reach across scripts, digits and white space, so that pieces cut elsewhere give other ids."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 20,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    return tokenizer


def assert_same_ids(tmp_path, tokenizer, texts=TEXTS, **options):
    folder = saved_tokenizer(tmp_path / "tokenizer", tokenizer, **options)
    saved(tmp_path / "source", folder, **TOP2)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert report["llama_cpp"]["num_texts"] == len(TEXTS)
    llama = load_engine(tmp_path / "model.gguf", LENGTH)
    try:
        for text in texts:
            ids = tokenizer.encode(text).ids
            assert llama.tokenize(text.encode(), add_bos=True, special=True) == ids, text
            # special tokens as text: what the trainer's DocumentEncoder does
            tokenizer.encode_special_tokens = True
            plain = tokenizer.encode(text, add_special_tokens=False).ids
            tokenizer.encode_special_tokens = False
            assert llama.tokenize(text.encode(), add_bos=False, special=False) == plain, text
        # one that llama.cpp would split otherwise in another script of the same tokenizer
        assert llama.token_eos() == tokenizer.token_to_id(EOS)
        assert llama.detokenize(tokenizer.encode(TEXTS[1]).ids).decode() == TEXTS[1]
    finally:
        llama.close()
    return report


@pytest.mark.parametrize(("name", "pre_tokenizer", "ignore_merges"), SHARED)
def test_token_ids(tmp_path, name, pre_tokenizer, ignore_merges):
    report = assert_same_ids(tmp_path, trained(name, pre_tokenizer, ignore_merges))
    assert report["tokenizer"]["pre"] == name


def test_token_ids_on_random_texts(tmp_path):
    # every category of characters next to every other
    pieces = ["a", "Z", "\u00e9", "\u0416", "\u65e5", "7", "\u00bd", "\u0663", " ", "  ", "\t", "\n", "\r\n", "\u00a0",
              "'", "'s", "'LL", ".", "--", "\U0001f680", "\u0301", "\u200d", "_", "$", "<", EOS]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    texts = [
        "".join(pieces[i] for i in torch.randint(len(pieces), (30,), generator=generator).tolist())
        for _ in range(200)
    ]
    for number, (name, pre_tokenizer, ignore_merges) in enumerate(SHARED):
        assert_same_ids(tmp_path / str(number), trained(name, pre_tokenizer, ignore_merges), texts)


def test_token_ids_with_added_tokens(tmp_path):
    # as GPT-NeoX: runs of spaces are tokens of their own, and a text begins with <s>
    tokenizer = trained("gpt-2", pre_tokenizers.ByteLevel(add_prefix_space=False), False)
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(12, 1, -1)])
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    assert_same_ids(tmp_path, tokenizer, bos_token="<s>")


def test_a_text_is_continued(tmp_path):
    tokenizer = trained("gpt-2", SHARED[0][1], False)
    folder = saved_tokenizer(tmp_path / "tokenizer", tokenizer)
    original = saved(tmp_path / "source", folder, **TOP2)
    export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    prompt = tokenizer.encode("The quick brown").ids
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = original.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
    llama = load_engine(tmp_path / "model.gguf", LENGTH)
    try:
        found = list(itertools.islice(llama.generate(prompt, temp=0.0, repeat_penalty=1.0), 12))
    finally:
        llama.close()
    assert found == expected


def test_a_file_without_a_tokenizer_runs(tmp_path):
    original = saved(tmp_path / "source", **TOP2)
    report = export(tmp_path / "source", "gguf", tmp_path / "model.gguf")
    assert report["llama_cpp"]["num_texts"] is None
    assert not any("not installed" in note for note in report["notes"])
    assert (engine_log_probs(tmp_path / "model.gguf") - log_probs(original)).abs().mean() <= BOUNDS["float32"]


def test_known_expressions_are_all_run():
    assert {name for name, *_ in SHARED} == set(pretokenizers._KNOWN.values())
    assert engine.BOUNDS.keys() == {"float32", "bfloat16", "float16"}
