"""How fast a matrix product and the reading of memory run here: the ceilings that a layer is held against."""

import statistics
import time
from collections.abc import Sequence

import torch

from dsmoe.bench.timing import interleaved_seconds
from dsmoe.model.kernels import inference, inference_kernel

_READ_AT_ONCE = 8 << 20


def gemm_flops_per_second(
    tokens: int,
    hidden_size: int,
    width: int,
    dtype: torch.dtype,
    rounds: int,
    products: Sequence[str] = ("forward", "input", "weight"),
) -> float:
    """Median rate of products of a dense MLP's forward and backward pass, into memory that is in use already.

    Args:
        tokens: T.
        hidden_size: D.
        width: W.
        dtype: of the matrices.
        rounds: timed rounds.
        products: "forward" [T, D] @ [D, W], "input" [T, W] @ [W, D], "weight" [W, T] @ [T, D]. An MLP's forward pass
            has the first two forms.

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
    seconds = interleaved_seconds({name: steps[name] for name in products}, rounds)
    total = sum(statistics.median(values) for values in seconds.values())
    return len(products) * 2 * tokens * hidden_size * width / total


def read_bytes_per_second(size: int, rounds: int) -> float:
    """Median rate at which all threads read memory that isn't in the cache, at most 8 MiB at a time.

    Args:
        size: bytes that are read, several times the largest cache.
        rounds: times that they are read.

    Returns:
        Bytes a second.
    """
    read = inference.read if inference_kernel("cpu") is not None else torch.sum
    pieces = torch.zeros(size // 4).split(min(size, _READ_AT_ONCE) // 4)
    rates = []
    for _ in range(rounds):
        for piece in pieces:
            start = time.perf_counter()
            read(piece)
            rates.append(piece.nbytes / (time.perf_counter() - start))
    return statistics.median(rates)
