"""Calibration text: a seeded sample of windows, from a token folder or from a file of documents."""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.documents import read_texts
from dsmoe.data.windows import text_batches
from dsmoe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_DOCUMENTS = 200_000


@dataclass
class CalibrationText:
    """Batches to calibrate on, and what they are.

    Attributes:
        batches: as of `dsmoe.data.windows.evaluation_batches`; those of a token folder also hold `documents` [B, S], the
            number of the document that each label belongs to.
        description: JSON-able: origin, split, seed, tokens, and `fingerprint`, a SHA-256 of the token ids.
    """

    batches: list[dict[str, Tensor]]
    description: dict[str, Any]


def sample_corpus(
    corpus: TokenCorpus, split: str, num_tokens: int, sequence_length: int, batch_size: int, seed: int
) -> CalibrationText:
    """Random windows of a split: each source in proportion to its tokens, no window twice.

    Args:
        corpus: the prepared corpus.
        split: "train", "validation" or "test".
        num_tokens: labels in all, rounded up to whole windows (all of the split's, if it holds fewer).
        sequence_length: labels of a window.
        batch_size: windows of a batch.
        seed: of the sample.

    Raises:
        UserError: no such split, one that is shorter than a window, or a number that can't be.
    """
    for value, least, what in (
        (num_tokens, 1, "tokens of a sample"), (sequence_length, 1, "the sequence length"),
        (batch_size, 1, "the batch size"), (seed, 0, "the seed"),
    ):  # fmt: skip
        if value < least:
            raise UserError(f"{what}: {value}; it must be at least {least}")
    total = corpus.num_tokens(split)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    num_documents = 0
    for place, name in enumerate(corpus.source_names):
        stream = corpus.stream(name, split)
        # the token before a window's first label is its first input
        starts = np.arange(1, len(stream) - sequence_length + 1, sequence_length)
        wanted = min(len(starts), -(-num_tokens * len(stream) // (total * sequence_length)))
        draws = np.random.default_rng([seed, place])
        chosen = np.sort(draws.choice(starts, size=wanted, replace=False))
        ends = stream.positions_of(corpus.eos_token_id)  # the eos token belongs to the document that it ends
        for start in chosen:
            documents = np.searchsorted(ends, np.arange(start, start + sequence_length)) + num_documents
            rows.append((stream.read(start - 1, start + sequence_length), documents))
        num_documents += len(ends) + 1
    if not rows:
        raise UserError(f"{corpus.folder}: split {split!r} has no window of {sequence_length} tokens")
    # shuffled, so that the first batches are a sample of all sources too
    random.Random(seed).shuffle(rows)
    batches = [_batch(rows[at : at + batch_size]) for at in range(0, len(rows), batch_size)]
    return _described(batches, {"corpus": corpus.fingerprint, "split": split, "seed": seed})


def _batch(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Tensor]:
    tokens, documents = (torch.from_numpy(np.stack(column)) for column in zip(*rows))
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "shift_labels": tokens[:, 1:].contiguous(),
        "attention_mask": torch.ones_like(tokens[:, 1:]),
        "documents": documents,
    }


def read_documents(path: Path, limit: int | None = None) -> Iterator[str]:
    """The documents of a file that are not blank: those would be an end of text each, and nothing else.

    Raises:
        UserError: a file that can't be read, or without any text.
    """
    found = (text for text in read_texts(path, limit=limit) if text.strip())
    first = next(found, None)
    if first is None:
        raise UserError(f"{path}: no text to calibrate on; give a file with documents that are not blank")
    return itertools.chain([first], found)


def sample_documents(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    num_tokens: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
) -> CalibrationText:
    """The documents of a file in a seeded random order, up to a number of tokens.

    Args:
        path: what `dsmoe.data.documents.read_texts` reads; of more than 200,000 documents the first so many.
        tokenizer: the model's.
        num_tokens: stop after the batch that reaches so many labels.
        sequence_length: labels of a window.
        batch_size: windows of a batch.
        seed: of the order.

    Raises:
        UserError: a file that can't be read, or without any text.
    """
    texts = list(read_documents(path, MAX_DOCUMENTS))
    random.Random(seed).shuffle(texts)
    batches: list[dict[str, Tensor]] = []
    seen = 0
    for batch in text_batches(tokenizer, texts, sequence_length, batch_size):
        batches.append(batch)
        seen += int((batch["shift_labels"] >= 0).sum())
        if seen >= num_tokens:
            break
    return _described(batches, {"file": path.name, "seed": seed})


def _described(batches: list[dict[str, Tensor]], origin: dict[str, Any]) -> CalibrationText:
    digest = hashlib.sha256()
    num_tokens = 0
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
        digest.update(batch["shift_labels"].numpy().tobytes())
        num_tokens += int((batch["shift_labels"] >= 0).sum())
    description = {**origin, "num_tokens": num_tokens, "sequence_length": batches[0]["input_ids"].shape[1]}
    return CalibrationText(batches, {**description, "fingerprint": digest.hexdigest()})
