"""The gated activation through torch.compile: `eager`'s formulas, fused by inductor."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dsmoe.model.kernels import check, eager

NAME = "compile"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _compiled(function: Callable) -> Callable:
    # only T varies from call to call (it is marked below): N and F stay constants that the code is made for; layers that
    # experts were removed from have several N, and after too many (8 by default) torch would go on without compiling
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)  # type: ignore[attr-defined]
    return torch.compile(function, dynamic=False)


def _mark(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.shape[0] > 1:  # 0 and 1 are always compiled as constants
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def forward(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """See `eager.forward`."""
    if torch.compiler.is_compiling():  # inside somebody else's torch.compile
        return eager.forward(h_TNH, gates_TN, mlp_type)
    _mark(h_TNH, gates_TN)
    return _compiled(eager.forward)(h_TNH, gates_TN, mlp_type)


def backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`."""
    if torch.compiler.is_compiling():
        return _backward(grad_TNF, h_TNH, gates_TN, mlp_type)
    _mark(grad_TNF, h_TNH, gates_TN)
    return _compiled(_backward)(grad_TNF, h_TNH, gates_TN, mlp_type)


def _backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`eager.backward` without its writes into place, which dynamo cannot trace and inductor does not need."""
    gates_TN1 = None if gates_TN is None else gates_TN.to(h_TNH.dtype)[..., None]
    scaled_grad = grad_TNF if gates_TN1 is None else grad_TNF * gates_TN1
    if mlp_type == "swiglu":
        gate, up = h_TNH.chunk(2, dim=-1)
        silu = functional.silu(gate)
        act = silu * up
        grad_h = torch.cat((torch.ops.aten.silu_backward(scaled_grad * up, gate), scaled_grad * silu), dim=-1)
    else:
        act = functional.gelu(h_TNH)
        grad_h = torch.ops.aten.gelu_backward(scaled_grad, h_TNH)
    if gates_TN1 is None:
        return grad_h, None, act
    return grad_h, (grad_TNF * act).sum(-1), act * gates_TN1


def probe(device_type: str) -> None:
    """Compile both directions for a small swiglu and check their numbers against `eager`; takes some seconds.

    Raises:
        check.KernelUnavailable: says what went wrong.
    """
    try:
        with torch.no_grad():
            # one case only: each takes seconds to compile
            check.against_eager(
                forward, backward, device_type, (torch.float32,), mlp_types=("swiglu",), gated=(True,)
            )
    except check.KernelUnavailable:
        raise
    except Exception as error:  # the compiler stack's errors have no common base but this
        message = " ".join(str(error).split())[:200]
        raise check.KernelUnavailable(f"torch.compile failed: {type(error).__name__}: {message}") from error
