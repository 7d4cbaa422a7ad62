"""Whether bfloat16 is any faster than float32 on this CPU: without instructions for it, it is many times slower."""

import time

import torch

# of a whole step the products are most, so twice the time there is no accident of the measurement
SLOW = 2.0


def bf16_note(precision: str, on_cpu: bool) -> str | None:
    """What to tell the user who trains in bfloat16 on a CPU that only emulates it; None where there is nothing to tell.

    Args:
        precision: `train.precision`.
        on_cpu: whether the model is there; on an accelerator nothing is measured.
    """
    if precision != "bf16" or not on_cpu:
        return None
    ratio = bf16_over_f32()
    if ratio < SLOW:
        return None
    return (
        f"note: on this CPU a bf16 matrix product takes {ratio:.0f} times as long as one in float32; "
        "--train.precision f32 trains faster"
    )


def bf16_over_f32(size: int = 256, repetitions: int = 5) -> float:
    """Time of a square bfloat16 matrix product as a multiple of the float32 one's, each the best of a few.

    Args:
        size: rows and columns.
        repetitions: of each, in turns.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    factors = {dtype: torch.ones(size, size, dtype=dtype) for dtype in best}
    for _ in range(repetitions):
        for dtype, factor in factors.items():
            begun = time.perf_counter()
            factor @ factor
            best[dtype] = min(best[dtype], time.perf_counter() - begun)
    return best[torch.bfloat16] / best[torch.float32]
