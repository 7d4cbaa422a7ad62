"""Does a kernel give the numbers of `eager` on this machine? Every other kernel is asked before it is used."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsmoe.model.kernels import eager

# largest error over the largest value; bfloat16 rounds to 2^-9, and eager rounds several times
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class KernelUnavailable(Exception):
    """A kernel cannot be used here; the message says why in one line."""


def against_eager(
    forward: Callable[..., Tensor], backward: Callable[..., tuple], device_type: str, dtypes: Iterable[torch.dtype]
) -> None:
    """Compare a kernel with `eager` in float64 on a few small inputs.

    Raises:
        KernelUnavailable: names the case and its error.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for mlp_type, scale in (("swiglu", 2), ("gelu", 1)):
            for gated in (True, False):
                shapes = ((5, 3, 17), (5, 3, 17 * scale), (5, 3))
                grad, h, gates = (torch.randn(s, generator=generator).to(device_type, dtype) for s in shapes)
                gates = gates if gated else None
                expected = _values(eager.forward, eager.backward, grad.double(), h.double(), gates, mlp_type)
                actual = _values(forward, backward, grad, h, gates, mlp_type)
                error = max(_error(a, e) for a, e in zip(actual, expected))
                if not error < _TOLERANCES[dtype]:
                    raise KernelUnavailable(f"its numbers are wrong here ({mlp_type}, {dtype}: error {error:.1e})")


def _values(forward, backward, grad: Tensor, h: Tensor, gates: Tensor | None, mlp_type: str) -> list[Tensor]:
    gates = None if gates is None else gates.to(h.dtype)
    values = [forward(h, gates, mlp_type), *backward(grad.clone(), h, gates, mlp_type)]
    return [value for value in values if value is not None]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
