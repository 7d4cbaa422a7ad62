"""`TrainLoader`: a sample's number determines its tokens, so that a position in training is one integer.

A source's tokens are one stream, cut into windows of `sequence_length` tokens (and one more, the last label).
Samples come in blocks of 1,024. Every block holds the same number of samples of each source, in an order
drawn from (seed, block). So sample i is number j of its source, in closed form; j // windows is the epoch of
that source, and window number permutation(seed, source, epoch)[j % windows] is what it shows. Whatever the
number of processes, whoever takes samples a ... b - 1 gets the same tokens.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TypeVar

import numpy as np
import torch

from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.windows import evaluation_batches, isolate, text_batches
from dsmoe.errors import UserError

__all__ = ["BLOCK_SIZE", "TrainLoader", "evaluation_batches", "text_batches"]

BLOCK_SIZE = 1024
# first word of each random key, so that no two kinds of draws share one
_BLOCK_ORDER, _WINDOW_ORDER, _CHOSEN_WINDOWS = 0, 1, 2
_Key = TypeVar("_Key")


class TrainLoader:
    """Batches of training windows, addressed by the number of samples before them. It has no state.

    Args:
        corpus: the prepared corpus.
        sequence_length: S, tokens of a window.
        seed: of the order of sources and windows; not negative.
        weights: source name to its share of sampled tokens, in any unit; sources left out are not sampled;
            null: the corpus' own weights.
        isolate_documents: restart position_ids after each eos, and mask the label of an eos.
        split: the split to read.
        unique_fraction: share of every source's windows that is ever read, above 0 and at most 1: with less text each
            window comes the more often, as where data is short. Which windows these are depends on the seed alone.

    Attributes:
        num_windows: source name to windows of one epoch of it (those that are read at all).
        block_counts: source name to samples in every block of 1,024.

    Raises:
        UserError: an unknown source or split, a source shorter than a window, or a positive weight so small
            that a block would hold none of its samples, or unique_fraction out of range.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        *,
        sequence_length: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
        isolate_documents: bool = False,
        split: str = "train",
        unique_fraction: float = 1.0,
    ):
        if sequence_length < 1:
            raise UserError(f"sequence_length is {sequence_length}; it must be at least 1 token")
        if seed < 0:
            raise UserError(f"seed is {seed}; it must not be negative")
        if not 0 < unique_fraction <= 1:
            raise UserError(f"data.unique_fraction is {unique_fraction}; it must be above 0 and at most 1")
        corpus.num_tokens(split)  # complains about an unknown split
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.seed = seed
        self.isolate_documents = isolate_documents
        names, shares = _checked_weights(corpus, weights)
        self._streams = [corpus.stream(name, split) for name in names]
        self._keys = [corpus.source_names.index(name) for name in names]
        self._windows = [(len(stream) - 1) // sequence_length for stream in self._streams]
        self._counts = largest_remainder(shares, BLOCK_SIZE)
        for name, stream, windows, count in zip(names, self._streams, self._windows, self._counts):
            if windows < 1:
                raise UserError(
                    f"{corpus.folder}: source {name!r} has {len(stream)} {split} tokens, and one window "
                    f"takes {sequence_length} + 1; lower sequence_length or leave the source out of weights"
                )
            if count == 0:
                raise UserError(
                    f"{corpus.folder}: the weight of source {name!r} is below {1 / BLOCK_SIZE:.4f} of the "
                    f"whole and rounds to no sample in {BLOCK_SIZE}; raise it, or set it to 0"
                )
        self._all_windows = self._windows
        if unique_fraction < 1:
            self._windows = [max(1, int(windows * unique_fraction)) for windows in self._windows]
        self.num_windows = dict(zip(names, self._windows))
        self.block_counts = dict(zip(names, self._counts))
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._permutations: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._choices: OrderedDict[int, np.ndarray] = OrderedDict()

    def locate(self, index: int) -> tuple[str, int, int]:
        """Where sample `index` (from 0) comes from: (source name, epoch of the source, window)."""
        source, epoch, window = self._locate(index)
        return self.corpus.source_names[self._keys[source]], epoch, window

    def batch(self, start: int, count: int) -> dict[str, torch.Tensor]:
        """Samples start, ..., start + count - 1.

        Returns:
            input_ids: int64 [count, S].
            shift_labels: int64 [count, S], the token after each input; -100 where isolation masks it.
            position_ids: int64 [count, S], only with `isolate_documents`.
        """
        size = self.sequence_length
        tokens = np.empty((count, size + 1), dtype=np.int64)
        for row in range(count):
            source, _, window = self._locate(start + row)
            tokens[row] = self._streams[source].read(window * size, (window + 1) * size + 1)
        batch = {"input_ids": tokens[:, :-1].copy(), "shift_labels": tokens[:, 1:].copy()}
        if self.isolate_documents:
            isolate(batch, self.corpus.eos_token_id)
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def epoch(self, position: int) -> dict[str, float]:
        """Epochs of each source that the first `position` samples amount to."""
        block, offset = divmod(position, BLOCK_SIZE)
        order, _ = self._block(block)
        return {
            name: (block * self._counts[i] + int((order[:offset] == i).sum())) / self._windows[i]
            for i, name in enumerate(self.num_windows)
        }

    def _locate(self, index: int) -> tuple[int, int, int]:
        if index < 0:
            raise IndexError(f"sample {index}; samples are counted from 0")
        block, offset = divmod(index, BLOCK_SIZE)
        order, rank = self._block(block)
        source = int(order[offset])
        local = block * self._counts[source] + int(rank[offset])
        epoch, position = divmod(local, self._windows[source])
        window = int(self._permutation(source, epoch)[position])
        if self._windows[source] < self._all_windows[source]:
            window = int(self._chosen(source)[window])
        return source, epoch, window

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample of a block, and how many samples of that source come before it there."""

        def draw() -> tuple[np.ndarray, np.ndarray]:
            order = np.repeat(np.arange(len(self._counts)), self._counts)
            order = order[permutation(BLOCK_SIZE, self.seed, _BLOCK_ORDER, block)]
            rank = np.empty(BLOCK_SIZE, dtype=np.int64)
            for source, count in enumerate(self._counts):
                rank[order == source] = np.arange(count)
            return order, rank

        return _cached(self._blocks, block, draw, size=4)

    def _chosen(self, source: int) -> np.ndarray:
        """The windows of a source that are read at all, in the order of the text."""

        def draw() -> np.ndarray:
            order = permutation(self._all_windows[source], self.seed, _CHOSEN_WINDOWS, self._keys[source])
            return np.sort(order[: self._windows[source]])

        return _cached(self._choices, source, draw, size=len(self._windows))

    def _permutation(self, source: int, epoch: int) -> np.ndarray:
        # the key is the source's place in the corpus: leaving another source out does not change its order
        def draw() -> np.ndarray:
            return permutation(self._windows[source], self.seed, _WINDOW_ORDER, self._keys[source], epoch)

        # two epochs of each source: a batch may straddle them
        return _cached(self._permutations, (source, epoch), draw, size=2 * len(self._windows))


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of 0 ... size - 1 that depends on the key alone, as a uint32 or int64 array.

    It sorts PCG64's raw words: numpy promises that stream for all versions, and not `Generator.permutation`.
    """
    words = np.random.PCG64(np.random.SeedSequence(key)).random_raw(size)
    order = np.argsort(words, kind="stable")
    return order.astype(np.uint32) if size <= 1 << 32 else order


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Integers that sum to `total`, as close to the shares as rounding down and then up allows."""
    exact = [total * share / sum(shares) for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _checked_weights(
    corpus: TokenCorpus, weights: Mapping[str, float] | None
) -> tuple[list[str], list[float]]:
    weights = corpus.weights if weights is None else weights
    for name, weight in weights.items():
        if name not in corpus.source_names:
            nearest = get_close_matches(name, corpus.source_names, n=1, cutoff=0.0)
            raise UserError(f"{corpus.folder}: weights: no source {name!r}; the nearest is {nearest[0]!r}")
        if not 0 <= weight < float("inf"):
            raise UserError(
                f"{corpus.folder}: the weight of source {name!r} is {weight!r}; it must be at least 0"
            )
    names = [name for name in corpus.source_names if weights.get(name, 0) > 0]
    if not names:
        raise UserError(f"{corpus.folder}: no source has a positive weight")
    return names, [weights[name] for name in names]


def _cached(cache: OrderedDict, key: _Key, draw: Callable, size: int):
    if key not in cache:
        cache[key] = draw()
        while len(cache) > size:
            cache.popitem(last=False)
    cache.move_to_end(key)
    return cache[key]
