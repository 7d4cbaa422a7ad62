"""Kept (token, expert) pairs, sorted by expert, so that each expert sees one contiguous block of rows.

Shapes: T tokens, P kept pairs, R rows of padded blocks, N experts, D hidden size.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


def kept_pairs(expert_mask_TN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kept pairs, sorted by expert and then by token.

    Args:
        expert_mask_TN: [T, N] bool.

    Returns:
        token of each pair [P] int64, expert of each pair [P] int64, pairs of each expert [N] int64.
    """
    expert_P, token_P = expert_mask_TN.T.nonzero(as_tuple=True)
    return token_P, expert_P, expert_mask_TN.sum(0)


def blocks(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, each with its rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def padded(count: int) -> int:
    """The count rounded up to four significant bits: at most an eighth more, and eight sizes between powers of two.

    oneDNN compiles a kernel for every new shape of a matrix product, which takes longer than a small product itself, and
    experts get another number of tokens in every batch.
    """
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


class PaddedPairs(NamedTuple):
    """Pairs sorted by expert in blocks of `padded` sizes.

    A row that only pads stands for a token that its expert has anyway, so that it brings nothing new into a product; its
    gate is zero.

    Attributes:
        counts: rows of each expert, N of them.
        token_R: token of each row, int64.
        place_P: row of each pair, sorted by token, int32.
        begin_T: where each token's places begin in that, int32.
    """

    counts: list[int]
    token_R: Tensor
    place_P: Tensor
    begin_T: Tensor


def padded_pairs(expert_mask_TN: Tensor) -> PaddedPairs:
    """Sort the pairs of a mask.

    Args:
        expert_mask_TN: [T, N] bool.
    """
    device = expert_mask_TN.device
    counts = [padded(count) for count in expert_mask_TN.sum(0).tolist()]
    counts_N = torch.tensor(counts, device=device)
    first_N = (counts_N.cumsum(0) - counts_N).to(torch.int32)
    rank_TN = expert_mask_TN.cumsum(0, dtype=torch.int32)
    place_P = (rank_TN + (first_N - 1))[expert_mask_TN]
    count_T = expert_mask_TN.sum(1, dtype=torch.int32)
    if not counts_N.any():
        token_R = counts_N.new_empty(0)
    else:
        a_token_N = expert_mask_TN.to(torch.uint8).argmax(0)  # any token of the expert
        token_R = a_token_N.repeat_interleave(counts_N)
        token_R[place_P] = expert_mask_TN.nonzero()[:, 0]
    return PaddedPairs(counts, token_R, place_P, count_T.cumsum(0, dtype=torch.int32) - count_T)


def sum_of_pairs(y_RD: Tensor, place_P: Tensor, begin_T: Tensor) -> Tensor:
    """The sum of each token's rows, taken in at least float32; zero for a token that has none. Records no gradient.

    Args:
        y_RD: [R, D] rows, sorted by expert.
        place_P: of `PaddedPairs`.
        begin_T: likewise.

    Returns:
        [T, D] in the dtype of `y_RD`.
    """
    if not place_P.numel():
        return y_RD.new_zeros(begin_T.shape[0], y_RD.shape[1])
    with torch.no_grad():  # a bag of rows of a table is what this is
        return functional.embedding_bag(place_P, y_RD, begin_T, mode="sum")
