"""Evaluation batches: every token of a split, of windows spread over it, or of some texts, is a label exactly once.

The input before the first token of a stream is eos, as if a document had just ended:

    tokens   a b c d e          windows of 3:  input   eos a b | c d eos
                                               label     a b c | d e -100
                                               mask      1 1 1 | 1 1 0
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from dsmoe.data.corpus import TokenCorpus, TokenStream
from dsmoe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
# how the part of a split is chosen, told in a run's summary: losses of differently chosen parts can't be compared
# (those of versions that took each source's first tokens have no such entry)
PLACEMENT = "spread"


def evaluation_batches(
    corpus: TokenCorpus,
    *,
    split: str,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    isolate_documents: bool = False,
    source: str | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches in which every token of a split, or of a part of it, is a label exactly once, source after source.

    Args:
        corpus: the prepared corpus.
        split: "train", "validation" or "test".
        sequence_length: S, tokens of a window.
        batch_size: B, windows of a batch; the last batch may have fewer.
        max_tokens: labels in all; null: all. Each source gives windows in proportion to its size, rounded up, evenly
            spread over the split: its first tokens may be a single document, and losses of one book compare models on
            that book.
        isolate_documents: restart position_ids after each eos and mask the label of an eos, as in training.
            The first token of a document is then no label.
        source: only the windows of this source, the same ones that it has beside the other sources'; null: all.

    Yields:
        input_ids, shift_labels (-100: none), attention_mask (0: padding), and position_ids with
        `isolate_documents`: int64 [B, S] each.

    Raises:
        UserError: no such split.
    """
    shown = _shown(corpus, split, sequence_length, max_tokens)
    eos = corpus.eos_token_id
    windows = (
        _window(stream, start, sequence_length, eos)
        for name, (stream, starts) in shown.items()
        if source in (None, name)
        for start in starts.tolist()
    )
    yield from _batches(windows, batch_size, eos, isolate_documents)


def shown_bytes_per_token(
    corpus: TokenCorpus,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    split: str,
    sequence_length: int,
    max_tokens: int | None = None,
) -> float:
    """UTF-8 bytes of text per token, eos counted, of what `evaluation_batches` shows of a split.

    The whole split's are known; of a part they are those of its decoded tokens, exact but for characters that a
    window's edges go through.

    Args:
        corpus: the prepared corpus.
        tokenizer: its tokenizer.
        split: as in `evaluation_batches`.
        sequence_length: the same.
        max_tokens: the same.

    Raises:
        UserError: no such split.
    """
    shown = [
        stream.read(start, min(start + sequence_length, len(stream)))
        for stream, starts in _shown(corpus, split, sequence_length, max_tokens).values()
        for start in starts.tolist()
    ]
    num_tokens = sum(map(len, shown))
    if num_tokens == corpus.num_tokens(split):
        return corpus.bytes_per_token(split)
    num_bytes = 0
    for tokens in shown:
        # eos is no text
        for document in np.split(tokens, np.flatnonzero(tokens == corpus.eos_token_id) + 1):
            ids = document[document != corpus.eos_token_id].tolist()
            text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            num_bytes += len(text.encode())
    return num_bytes / num_tokens


def _shown(
    corpus: TokenCorpus, split: str, size: int, max_tokens: int | None
) -> dict[str, tuple[TokenStream, np.ndarray]]:
    """The streams of a split that hold anything, by source, and where in each the windows that are shown begin."""
    if size < 1:
        raise UserError(f"sequence_length is {size}; it must be at least 1 token")
    total = corpus.num_tokens(split)
    streams = {name: stream for name in corpus.source_names if len(stream := corpus.stream(name, split))}
    shown = total if max_tokens is None else min(total, max_tokens)

    def starts(length: int) -> np.ndarray:
        windows = -(-length // size)
        # rounded up: max_tokens=1 still measures something of every source
        wanted = windows if shown == total else min(windows, -(-length * shown // (total * size)))
        return (2 * np.arange(wanted) + 1) * windows // (2 * wanted) * size

    return {name: (stream, starts(len(stream))) for name, stream in streams.items()}


def text_batches(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Iterable[str],
    sequence_length: int,
    batch_size: int,
    isolate_documents: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """The same from documents as strings, each followed by eos.

    Args:
        tokenizer: a fast tokenizer with an eos token.
        texts: the documents (`dsmoe.data.documents.read_texts` reads them from a file).
        sequence_length: S, tokens of a window.
        batch_size: B, windows of a batch.
        isolate_documents: as in `evaluation_batches`.

    Yields:
        Batches as in `evaluation_batches`.

    Raises:
        UserError: the tokenizer is not a fast one or has no eos token.
    """
    from dsmoe.data.tokenization import DocumentEncoder

    encoder = DocumentEncoder(tokenizer)
    windows = _windows(encoder.encode(texts), sequence_length, encoder.eos_token_id)
    yield from _batches(windows, batch_size, encoder.eos_token_id, isolate_documents)


def isolate(batch: dict[str, np.ndarray], eos_token_id: int) -> None:
    """Add position_ids that restart after each eos, and mask the labels of eos inputs, in place.

    Args:
        batch: input_ids and shift_labels, int64 [B, S].
        eos_token_id: the token that ends a document.
    """
    is_eos_BS = batch["input_ids"] == eos_token_id
    place_S = np.arange(is_eos_BS.shape[1])
    start_BS = np.zeros(is_eos_BS.shape, dtype=np.int64)
    start_BS[:, 1:] = np.where(is_eos_BS[:, :-1], place_S[1:], 0)
    batch["position_ids"] = place_S - np.maximum.accumulate(start_BS, axis=1)
    batch["shift_labels"][is_eos_BS] = IGNORED


def _window(stream: TokenStream, start: int, size: int, eos_token_id: int) -> np.ndarray:
    """(One token before +) at most `size` labels of a stream, padded with -1, which stands for no label."""
    stop = min(start + size, len(stream))
    window = np.full(size + 1, -1, dtype=np.int64)
    window[0] = stream.read(start - 1, start)[0] if start else eos_token_id
    window[1 : stop - start + 1] = stream.read(start, stop)
    return window


def _windows(chunks: Iterable[np.ndarray], size: int, eos_token_id: int) -> Iterator[np.ndarray]:
    """Cut a stream given in chunks into windows of (one token before +) at most `size` labels."""
    if size < 1:
        raise UserError(f"sequence_length is {size}; it must be at least 1 token")
    before = np.array([eos_token_id], dtype=np.int64)
    # parts that do not fill a window yet, the token before them first
    rest, length = [before], 0
    for chunk in chunks:
        rest.append(chunk.astype(np.int64))
        length += len(chunk)
        if length < size:
            continue
        tokens = np.concatenate(rest)
        cut = length // size * size
        for at in range(0, cut, size):
            yield tokens[at : at + size + 1]
        rest, length = [tokens[cut:]], length - cut
    if length:
        # padded as in _window
        yield np.concatenate([*rest, np.full(size - length, -1, dtype=np.int64)])


def _batches(
    windows: Iterator[np.ndarray], batch_size: int, eos_token_id: int, isolate_documents: bool
) -> Iterator[dict[str, torch.Tensor]]:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1 window")
    rows: list[np.ndarray] = []
    for window in windows:
        rows.append(window)
        if len(rows) == batch_size:
            yield _batch(rows, eos_token_id, isolate_documents)
            rows = []
    if rows:
        yield _batch(rows, eos_token_id, isolate_documents)


def _batch(rows: list[np.ndarray], eos_token_id: int, isolate_documents: bool) -> dict[str, torch.Tensor]:
    tokens = np.stack(rows)
    inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    padding = labels < 0
    # the input before the padding is the stream's last token, which has no successor
    inputs[padding] = eos_token_id
    labels[padding] = IGNORED
    batch = {"input_ids": inputs, "shift_labels": labels, "attention_mask": (~padding).astype(np.int64)}
    if isolate_documents:
        isolate(batch, eos_token_id)
    return {name: torch.from_numpy(value) for name, value in batch.items()}
