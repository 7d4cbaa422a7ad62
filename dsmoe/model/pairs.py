"""Kept (token, expert) pairs, sorted by expert, so that each expert sees one contiguous block of rows.

Shapes: T tokens, P kept pairs, N experts, D hidden size.
"""

from collections.abc import Iterator, Sequence

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
    """Experts that have pairs, each with the rows of its pairs."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def pairs_of_tokens(expert_mask_TN: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    """Where the pairs of each token stand among those sorted by expert.

    Args:
        expert_mask_TN: [T, N] bool.
        counts_N: [N] int64, as `kept_pairs` gives them.

    Returns:
        place of each pair, sorted by token [P] int32; where each token's places begin [T] int32.
    """
    first_N = (counts_N.cumsum(0) - counts_N).to(torch.int32)
    place_TN = expert_mask_TN.cumsum(0, dtype=torch.int32) + (first_N - 1)
    count_T = expert_mask_TN.sum(1, dtype=torch.int32)
    return place_TN[expert_mask_TN], count_T.cumsum(0, dtype=torch.int32) - count_T


def sum_of_pairs(y_PD: Tensor, place_P: Tensor, begin_T: Tensor) -> Tensor:
    """The sum of each token's rows, taken in at least float32; zero for a token that has none. Records no gradient.

    Args:
        y_PD: [P, D] rows, sorted by expert.
        place_P: of `pairs_of_tokens`.
        begin_T: likewise.

    Returns:
        [T, D] in the dtype of `y_PD`.
    """
    if not place_P.numel():
        return y_PD.new_zeros(begin_T.shape[0], y_PD.shape[1])
    with torch.no_grad():  # a bag of rows of a table is what this is
        return functional.embedding_bag(place_P, y_PD, begin_T, mode="sum")
