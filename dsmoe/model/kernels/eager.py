"""The gated activation in plain torch operations: the portable fallback and the oracle of the other kernels.

Shapes: T tokens, N experts, F hidden units of one expert, H = 2F (swiglu: gate rows, then up rows) or F (gelu).
"""

import torch
from torch import Tensor
from torch.nn import functional

NAME = "eager"


def forward(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """Activation of the hidden units times the gate of their expert.

    Args:
        h_TNH: [T, N, H] pre-activations.
        gates_TN: [T, N] gates, or None for gates of one.
        mlp_type: "swiglu" or "gelu".

    Returns:
        [T, N, F] in the dtype of `h_TNH`.
    """
    # in place where autograd records nothing: these tensors are as large as anything in the layer
    if mlp_type == "swiglu":
        gate, up = h_TNH.chunk(2, dim=-1)
        silu = functional.silu(gate)
        act = silu * up if _recorded(silu, up) else silu.mul_(up)
    else:
        act = functional.gelu(h_TNH)
    if gates_TN is None:
        return act
    gates_TN1 = gates_TN.to(act.dtype)[..., None]
    return act * gates_TN1 if _recorded(act, gates_TN1) else act.mul_(gates_TN1)


def _recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `forward`, and its result again (recomputed rather than saved).

    Args:
        grad_TNF: [T, N, F] gradient of the result; may be overwritten.
        h_TNH: [T, N, H] as given to `forward`.
        gates_TN: [T, N] or None, as given to `forward`.
        mlp_type: "swiglu" or "gelu".

    Returns:
        gradient of h [T, N, H], gradient of the gates [T, N] (None without gates), result of `forward` [T, N, F].
    """
    grad_gates = None
    if mlp_type == "swiglu":
        gate, up = h_TNH.chunk(2, dim=-1)
        silu = functional.silu(gate)
        act = silu * up
    else:
        act = functional.gelu(h_TNH)
    if gates_TN is not None:
        gates_TN1 = gates_TN.to(act.dtype)[..., None]
        grad_gates = torch.linalg.vecdot(grad_TNF, act)
        act.mul_(gates_TN1)
        grad_TNF = grad_TNF.mul_(gates_TN1)
    if mlp_type == "gelu":
        return torch.ops.aten.gelu_backward(grad_TNF, h_TNH), grad_gates, act
    # written into place: fresh memory costs more than the arithmetic here
    grad_h = torch.empty_like(h_TNH)
    grad_gate, grad_up = grad_h.chunk(2, dim=-1)
    torch.mul(grad_TNF, silu, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_TNF.mul_(up), gate, grad_input=grad_gate)
    return grad_h, grad_gates, act
