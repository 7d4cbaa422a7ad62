"""The gated activation in plain torch operations: the portable fallback and the oracle of the other kernels.

Shapes: T tokens, N experts, F hidden units of one expert, H = 2F (swiglu: gate rows, then up rows) or F (gelu).
"""

import math

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
    if mlp_type == "swiglu":
        gate, up = h_TNH.chunk(2, dim=-1)
        act = functional.silu(gate).mul_(up) if not h_TNH.requires_grad else functional.silu(gate) * up
    else:
        act = functional.gelu(h_TNH)
    if gates_TN is None:
        return act
    return act.mul_(gates_TN[..., None]) if not act.requires_grad else act * gates_TN[..., None]


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
    if mlp_type == "swiglu":
        gate, up = h_TNH.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        act = silu * up
    else:
        act = functional.gelu(h_TNH)
    grad_gates = None
    if gates_TN is not None:
        grad_gates = torch.einsum("tnf,tnf->tn", grad_TNF, act)
        grad_TNF = grad_TNF * gates_TN[..., None]
    if mlp_type == "swiglu":
        grad_h = torch.empty_like(h_TNH)
        grad_gate, grad_up = grad_h.chunk(2, dim=-1)
        torch.mul(grad_TNF, silu, out=grad_up)
        # d silu(g) / dg = sigmoid(g) + silu(g) * (1 - sigmoid(g))
        slope = silu.addcmul_(silu, sigmoid, value=-1).add_(sigmoid)
        torch.mul(slope.mul_(up), grad_TNF, out=grad_gate)
    else:
        # d gelu(h) / dh = Phi(h) + h * phi(h)
        phi = torch.exp(-0.5 * h_TNH * h_TNH) / math.sqrt(2 * math.pi)
        cdf = 0.5 * (1 + torch.erf(h_TNH / math.sqrt(2)))
        grad_h = grad_TNF * (cdf + h_TNH * phi)
    result = act if gates_TN is None else act * gates_TN[..., None]
    return grad_h, grad_gates, result
