"""Faster float32 matrix products on CPU, where they are as accurate as the ordinary ones."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# float32 sums of a thousand products are off by about 2e-7; rounding the inputs to bfloat16 would give 3e-3
LARGEST_ERROR = 1e-6


def choose_float32_matmul(wanted: str, device_type: str = "cpu") -> str:
    """Set oneDNN's float32 matmul mode for this process.

    On CPUs with AVX512-BF16 and without AMX, oneDNN's "bf16" mode runs up to twice as fast at full float32 accuracy;
    with AMX it really rounds to bfloat16. So it is tried and measured.

    Args:
        wanted: "auto" (the fast mode where a probe finds it accurate) or "strict" (never).
        device_type: of the model; on another than "cpu" nothing is changed (the mode would only keep
            `torch.get_float32_matmul_precision` from working).

    Returns:
        The mode in use: "bf16" or "ieee".
    """
    if device_type != "cpu":
        return "ieee"
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    setting.fp32_precision = "ieee"
    if wanted == "strict" or not torch.backends.mkldnn.is_available():
        return "ieee"
    setting.fp32_precision = "bf16"
    if _probe() > LARGEST_ERROR:
        setting.fp32_precision = "ieee"
    return str(setting.fp32_precision)


@contextmanager
def float32_matmul(wanted: str) -> Iterator[str]:
    """`choose_float32_matmul` for a block; yields the mode in use and puts the earlier one back."""
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    try:
        yield choose_float32_matmul(wanted)
    finally:
        setting.fp32_precision = before


def _probe() -> float:
    """Largest relative error of products of several shapes."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, inner, columns in ((256, 128, 512), (64, 1024, 256), (33, 65, 129)):
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(columns, inner, generator=generator)
        exact = left.double() @ right.double().T
        worst = max(worst, float(((left @ right.T) - exact).norm() / exact.norm()))
    return worst
