"""How fast a matrix product runs here: the ceiling that a layer is held against."""

import statistics

import torch

from dsmoe.bench.timing import interleaved_seconds


def gemm_flops_per_second(
    tokens: int, hidden_size: int, width: int, dtype: torch.dtype, rounds: int
) -> float:
    """Median rate of the products of a dense MLP's forward and backward pass, into memory that is in use already.

    Args:
        tokens: T.
        hidden_size: D.
        width: W.
        dtype: of the matrices.
        rounds: timed rounds.

    Returns:
        Floating-point operations a second, multiplications and additions counted apart.
    """
    x_TD, h_TW = torch.randn(tokens, hidden_size).to(dtype), torch.randn(tokens, width).to(dtype)
    weight_WD = torch.randn(width, hidden_size).to(dtype)
    outs = [torch.empty_like(matrix) for matrix in (h_TW, x_TD, weight_WD)]
    steps = {
        "forward": lambda: torch.mm(x_TD, weight_WD.T, out=outs[0]),
        "input": lambda: torch.mm(h_TW, weight_WD, out=outs[1]),
        "weight": lambda: torch.mm(h_TW.T, x_TD, out=outs[2]),
    }
    seconds = interleaved_seconds(steps, rounds)
    total = sum(statistics.median(values) for values in seconds.values())
    return 3 * 2 * tokens * hidden_size * width / total
