"""The gated activation through torch.compile: `eager`'s formulas, fused by inductor."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dsmoe.model.kernels import check, eager

NAME = "compile"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _compiled(function: Callable) -> Callable:
    # only T varies from call to call (it is marked below): N and F stay constants that the code is made for
    return torch.compile(function, dynamic=False)


def _mark(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.shape[0] > 1:  # 0 and 1 are always compiled as constants
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def forward(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """See `eager.forward`."""
    _mark(h_TNH, gates_TN)
    return _compiled(eager.forward)(h_TNH, gates_TN, mlp_type)


def backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`."""
    _mark(grad_TNF, h_TNH, gates_TN)
    return _compiled(eager.backward)(grad_TNF, h_TNH, gates_TN, mlp_type)


def probe(device_type: str) -> None:
    """Compile both directions and check their numbers against `eager`; takes some seconds.

    Raises:
        check.KernelUnavailable: says what went wrong.
    """
    try:
        with torch.no_grad():
            check.against_eager(forward, backward, device_type, (torch.float32,))
    except check.KernelUnavailable:
        raise
    except Exception as error:  # the compiler stack's errors have no common base but this
        lines = str(error).strip().splitlines() or [""]
        raise check.KernelUnavailable(f"torch.compile failed: {type(error).__name__}: {lines[0]}") from error
