"""The vocabulary of a GGUF file: what llama.cpp shares is named, everything else is refused with one line."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from dsmoe import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.export.gguf import pretokenizers
from dsmoe.export.gguf.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, add_vocabulary, read_vocabulary

TEXT = ["the quick brown fox jumps over 12345 lazy dogs\n\n  don't you see? " * 3]
EOS = "<|endoftext|>"


def split(expression, behavior="isolated", invert=False):
    return pre_tokenizers.Split(Regex(expression), behavior, invert)


def in_bytes(use_regex=False, add_prefix_space=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def trained(pre_tokenizer, specials=(EOS,), size=300, **of_model):
    tokenizer = Tokenizer(models.BPE(**of_model))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def saved(folder, tokenizer, **options):
    options = {"eos_token": EOS, **options}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(folder)
    return folder


def vocabulary(folder, tokenizer, vocab_size=320, **options):
    return read_vocabulary(saved(folder, tokenizer, **options), DSMoEConfig(vocab_size=vocab_size))


def sequence(*parts):
    return pre_tokenizers.Sequence(list(parts))


SHARED = [
    ("gpt-2", in_bytes(use_regex=True), False),
    ("gpt-2", sequence(in_bytes(use_regex=True)), False),
    ("gpt-2", sequence(split(pretokenizers._GPT2), in_bytes()), False),
    ("smollm", sequence(pre_tokenizers.Digits(individual_digits=True), in_bytes(use_regex=True)), False),
    ("llama-bpe", sequence(split(pretokenizers._LLAMA3), in_bytes()), True),
    ("dbrx", sequence(split(pretokenizers._LLAMA3), in_bytes()), False),
    ("dbrx", sequence(split(pretokenizers._CL100K, "removed", True), in_bytes()), False),
    ("qwen2", sequence(split(pretokenizers._QWEN2), in_bytes()), False),
]


@pytest.mark.parametrize(("name", "pre_tokenizer", "ignore_merges"), SHARED)
def test_shared_pretokenizers(tmp_path, name, pre_tokenizer, ignore_merges):
    assert vocabulary(tmp_path, trained(pre_tokenizer, ignore_merges=ignore_merges)).pre == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "of_model", "message"),
    [
        (sequence(split(r"\w+|\s+"), in_bytes()), {}, r"\\w\+"),
        (in_bytes(), {}, "expressions: none"),
        (in_bytes(use_regex=True), {"ignore_merges": True}, "ignore_merges true"),
        (in_bytes(use_regex=True, add_prefix_space=True), {}, "add_prefix_space"),
        (sequence(pre_tokenizers.Punctuation(), in_bytes(use_regex=True)), {}, "'Punctuation'"),
        (sequence(split(pretokenizers._GPT2, "removed"), in_bytes()), {}, "'Split'"),
        (
            sequence(pre_tokenizers.Digits(individual_digits=False), in_bytes(use_regex=True)),
            {},
            r"N\}\+ then",
        ),
        (pre_tokenizers.Metaspace(), {}, "not byte-level"),
    ],
)
def test_other_pretokenizers_are_refused(tmp_path, pre_tokenizer, of_model, message):
    with pytest.raises(UserError, match=message) as caught:
        vocabulary(tmp_path, trained(pre_tokenizer, **of_model))
    assert "SmolLM" in str(caught.value) and "--no-tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def gpt2(**changed):
    tokenizer = trained(in_bytes(use_regex=True))
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_lists(tmp_path):
    tokenizer = gpt2()
    tokenizer.add_tokens([AddedToken("    ", normalized=True)])
    tokenizer.add_special_tokens(["<|pad|>"])
    found = vocabulary(tmp_path, tokenizer, pad_token="<|pad|>")
    assert len(found.tokens) == len(found.types) == 320
    assert len(set(found.tokens)) == 320
    for token, number in tokenizer.get_vocab().items():
        assert found.tokens[number] == token
    types = dict(zip(found.tokens, found.types, strict=True))
    assert (types[EOS], types["<|pad|>"], types["    "], types["a"]) == (
        CONTROL,
        CONTROL,
        USER_DEFINED,
        NORMAL,
    )
    assert types["[PAD319]"] == UNUSED
    assert any(f"{320 - tokenizer.get_vocab_size()} rows" in note for note in found.notes)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert found.merges == [" ".join(pair) for pair in merges]
    eos = tokenizer.token_to_id(EOS)
    assert found.special_ids == {"bos": eos, "eos": eos, "pad": tokenizer.token_to_id("<|pad|>")}
    assert (found.add_bos, found.add_eos) == (False, False)


def test_names_of_unused_rows_are_unique(tmp_path):
    # llama.cpp ends the process over two equal tokens
    tokenizer = trained(in_bytes(use_regex=True), specials=(EOS, "[PAD319]"))
    found = vocabulary(tmp_path, tokenizer)
    assert len(set(found.tokens)) == 320
    assert found.types[319] == UNUSED


@pytest.mark.parametrize(("single", "expected"), [("<s> $A", (True, False)), (f"$A {EOS}", (False, True))])
def test_tokens_added_by_encoding(tmp_path, single, expected):
    tokenizer = trained(in_bytes(use_regex=True), specials=(EOS, "<s>"))
    ids = [(name, tokenizer.token_to_id(name)) for name in (EOS, "<s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    found = vocabulary(tmp_path, tokenizer)
    assert (found.add_bos, found.add_eos) == expected
    # the template says which token begins a text, though the tokenizer names none
    assert found.special_ids["bos"] == tokenizer.token_to_id("<s>" if expected[0] else EOS)


def test_two_tokens_before_a_text_are_refused(tmp_path):
    tokenizer = trained(in_bytes(use_regex=True), specials=(EOS, "<s>"))
    ids = [(name, tokenizer.token_to_id(name)) for name in (EOS, "<s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{EOS} <s> $A", special_tokens=ids)
    with pytest.raises(UserError, match="2 tokens before"):
        vocabulary(tmp_path, tokenizer)


def test_nfc_is_noted_and_other_normalizers_are_refused(tmp_path):
    found = vocabulary(tmp_path / "nfc", gpt2(normalizer=normalizers.NFC()))
    assert any("NFC" in note for note in found.notes)
    with pytest.raises(UserError, match="Lowercase"):
        vocabulary(tmp_path / "lower", gpt2(normalizer=normalizers.Lowercase()))


def test_stripping_tokens_are_refused(tmp_path):
    tokenizer = gpt2()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True)])
    with pytest.raises(UserError, match="'<mask>' has lstrip"):
        vocabulary(tmp_path, tokenizer)


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no BPE"):
        vocabulary(tmp_path / "level", Tokenizer(models.WordLevel({EOS: 0, "a": 1}, unk_token="a")))
    with pytest.raises(UserError, match="byte_fallback"):
        vocabulary(tmp_path / "bytes", trained(pre_tokenizers.Metaspace(), byte_fallback=True))


def test_tokens_beyond_the_table_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"beyond model\.vocab_size 299"):
        vocabulary(tmp_path, gpt2(), vocab_size=299)


def test_end_of_sequence_is_named(tmp_path):
    folder = saved(tmp_path, gpt2(), eos_token=None)
    config = DSMoEConfig(vocab_size=320, eos_token_id=7)
    assert read_vocabulary(folder, config).special_ids["eos"] == 7
    with pytest.raises(UserError, match="end-of-sequence"):
        read_vocabulary(folder, DSMoEConfig(vocab_size=320, eos_token_id=None))


def test_a_bare_file_and_no_file(tmp_path):
    assert read_vocabulary(tmp_path, DSMoEConfig(vocab_size=320)) is None
    gpt2().save(str(tmp_path / "tokenizer.json"))
    found = read_vocabulary(tmp_path, DSMoEConfig(vocab_size=320, eos_token_id=0))
    assert (found.pre, found.special_ids["eos"]) == ("gpt-2", 0)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="can't be loaded"):
        read_vocabulary(tmp_path, DSMoEConfig(vocab_size=320))


def test_written_and_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    found = vocabulary(tmp_path, gpt2(), chat_template=template)
    assert found.chat_template == template
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add_vocabulary(writer, found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields

    def value(key):
        return fields[f"tokenizer.{key}"].contents()

    assert value("ggml.tokens") == found.tokens
    assert value("ggml.token_type") == found.types
    assert value("ggml.merges") == found.merges
    assert (value("ggml.model"), value("ggml.pre"), value("chat_template")) == ("gpt2", "gpt-2", template)
    assert (value("ggml.add_bos_token"), value("ggml.add_eos_token")) == (False, False)
