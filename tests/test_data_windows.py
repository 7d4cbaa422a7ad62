"""Evaluation batches: every token is a label exactly once, with the token before it as input."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_data_loader import EOS, tokens_of, write_corpus

from dsmoe.data.loader import evaluation_batches
from dsmoe.data.tokenization import train_tokenizer
from dsmoe.data.windows import shown_bytes_per_token, text_batches
from dsmoe.errors import UserError

LENGTHS = {"first": 100, "second": 31, "third": 12}


def labelled(batches):
    """(input, label) of every label, in order."""
    pairs = []
    for batch in batches:
        keep = batch["shift_labels"] != -100
        pairs += zip(batch["input_ids"][keep].tolist(), batch["shift_labels"][keep].tolist())
    return pairs


def expected(*streams):
    return [pair for tokens in streams for pair in zip([EOS, *tokens[:-1]], tokens)]


@given(
    lengths=st.lists(st.integers(1, 120), min_size=1, max_size=3),
    size=st.integers(1, 20),
    rows=st.integers(1, 5),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_every_token_is_a_label_once(tmp_path, lengths, size, rows):
    streams = {f"s{i}": {"validation": tokens_of(length, i).tolist()} for i, length in enumerate(lengths)}
    corpus = write_corpus(tmp_path / "corpus", streams)
    batches = list(evaluation_batches(corpus, split="validation", sequence_length=size, batch_size=rows))
    assert labelled(batches) == expected(*(splits["validation"] for splits in streams.values()))
    for batch in batches:
        assert batch["input_ids"].shape == batch["shift_labels"].shape == batch["attention_mask"].shape
        assert batch["input_ids"].shape[0] <= rows
        assert torch.equal(batch["attention_mask"] == 0, batch["shift_labels"] == -100)
        assert (batch["input_ids"][batch["attention_mask"] == 0] == EOS).all()
        assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("shown", [None, 60])
def test_sources_alone_make_the_whole(tmp_path, shown):
    streams = {
        name: {"test": tokens_of(length, i).tolist()} for i, (name, length) in enumerate(LENGTHS.items())
    }
    corpus = write_corpus(tmp_path / "corpus", streams)
    wanted = {"split": "test", "sequence_length": 7, "batch_size": 3, "max_tokens": shown}
    parts = {name: labelled(evaluation_batches(corpus, source=name, **wanted)) for name in LENGTHS}
    assert [pair for part in parts.values() for pair in part] == labelled(
        evaluation_batches(corpus, **wanted)
    )
    for name, part in parts.items():
        assert part and set(part) <= set(expected(streams[name]["test"]))


def test_isolation_masks_the_label_of_eos(tmp_path):
    tokens = tokens_of(100).tolist()
    corpus = write_corpus(tmp_path / "corpus", {"a": {"test": tokens}})
    batches = list(
        evaluation_batches(corpus, split="test", sequence_length=9, batch_size=4, isolate_documents=True)
    )
    assert labelled(batches) == [(before, label) for before, label in expected(tokens) if before != EOS]
    for batch in batches:
        restart = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        restart[:, 0] = True
        restart[:, 1:] = batch["input_ids"][:, :-1] == EOS
        assert torch.equal(batch["position_ids"] == 0, restart)


def test_max_tokens_spreads_windows_over_every_source(tmp_path):
    streams = {"a": tokens_of(300, 0).tolist(), "b": tokens_of(100, 1).tolist()}
    corpus = write_corpus(
        tmp_path / "corpus", {name: {"validation": tokens} for name, tokens in streams.items()}
    )
    options = {"split": "validation", "sequence_length": 7, "batch_size": 2}
    pairs = labelled(evaluation_batches(corpus, max_tokens=40, **options))
    # 30 of 40 labels are a's: 5 windows of its 43, in the middle of as many equal parts; 2 of b's 15
    starts = [("a", 7 * place) for place in (4, 12, 21, 30, 38)] + [("b", 7 * place) for place in (3, 11)]
    assert pairs == [pair for name, at in starts for pair in expected(streams[name])[at : at + 7]]
    assert len(labelled(evaluation_batches(corpus, max_tokens=10_000, **options))) == 400


@given(length=st.integers(1, 300), size=st.integers(1, 20), max_tokens=st.integers(1, 300))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_part_is_as_large_as_asked_and_reaches_everywhere(tmp_path, length, size, max_tokens):
    tokens = list(range(1, length + 1))
    corpus = write_corpus(tmp_path / "corpus", {"a": {"validation": tokens}})
    pairs = labelled(
        evaluation_batches(
            corpus, split="validation", sequence_length=size, batch_size=3, max_tokens=max_tokens
        )
    )
    # every token follows its neighbour and none comes twice
    assert set(pairs) <= set(expected(tokens)) and pairs == sorted(set(pairs), key=lambda pair: pair[1])
    wanted = min(length, max_tokens)
    assert (
        wanted - size < len(pairs) < wanted + size
    )  # whole windows; the last one of the stream may be short
    # no part of the stream wider than two steps between windows is left out
    labels = [0, *(label for _, label in pairs), length + 1]
    step = -(-length // size) / -(-wanted // size) * size
    assert max(right - left for left, right in pairwise(labels)) <= step + 2 * size


@pytest.mark.parametrize("max_tokens", [20, 200, None])
def test_bytes_of_the_part_that_is_shown(tmp_path, max_tokens):
    # bytes a token vary from source to source and from part to part
    sources = {"a": ["The cat sat. " * 9, "on a mat"] * 6, "b": ["xyzzy qwrt " * 5, "The cat sat. " * 40]}
    tokenizer = train_tokenizer(["The cat sat. on the mat"] * 3, 280)
    streams, texts = {}, {}
    for name, documents in sources.items():
        ids = tokenizer.backend_tokenizer.encode_batch(documents)
        tokens = [token for encoding in ids for token in [*encoding.ids, tokenizer.eos_token_id]]
        streams[name], texts[name] = {"validation": tokens}, "".join(documents)
    corpus = write_corpus(tmp_path / "corpus", streams)
    assert corpus.eos_token_id == tokenizer.eos_token_id
    options = {"split": "validation", "sequence_length": 7, "max_tokens": max_tokens}
    found = shown_bytes_per_token(corpus, tokenizer, **options)
    if max_tokens is None:
        assert found == corpus.bytes_per_token("validation")
        return
    batches = evaluation_batches(corpus, batch_size=2, **options)
    labels = [label for _, label in labelled(batches)]
    # in a byte-level vocabulary a token's name has one character a byte
    sizes = [0 if label == EOS else len(tokenizer.convert_ids_to_tokens(label)) for label in labels]
    assert found == pytest.approx(sum(sizes) / len(sizes), rel=1e-12)
    whole = sum(map(len, texts.values())) / corpus.num_tokens("validation")
    assert abs(found / whole - 1) > 0.01


def test_unknown_split(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", {"a": {"train": [1, 2, 3]}})
    with pytest.raises(UserError, match="no split 'validation'"):
        list(evaluation_batches(corpus, split="validation", sequence_length=2, batch_size=1))


def test_text_batches_equal_one_stream():
    texts = ["The cat sat.\n", "on the mat, <|endoftext|> said", "été " * 30]
    tokenizer = train_tokenizer(texts * 3, 300)
    pieces = [tokenizer.backend_tokenizer.encode(text).ids for text in texts]
    batches = list(text_batches(tokenizer, texts, sequence_length=5, batch_size=3))
    pairs = labelled(batches)
    stream = np.array([label for _, label in pairs])
    assert pairs == expected(stream.tolist())
    ends = np.flatnonzero(stream == tokenizer.eos_token_id)
    # the end of text spelled out in the second document is ordinary text
    assert len(ends) == 3
    assert stream[: ends[0]].tolist() == pieces[0]
    assert stream[ends[1] + 1 : ends[2]].tolist() == pieces[2]
    assert tokenizer.decode(stream[ends[0] + 1 : ends[1]]) == texts[1]
