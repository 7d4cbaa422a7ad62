"""The output projection of gated attention heads: one wide product over all experts, gates on its input.

An autograd.Function so that the gated heads aren't kept (attention keeps its output anyway) and temporaries are few.

Shapes: T tokens, A experts, W width of one expert's heads, D hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.model.autocast import compute_dtype


class _GatedProjection(torch.autograd.Function):
    """Saves its input, the gates and the Parameter itself."""

    @staticmethod
    def forward(ctx: Any, heads_TAW: Tensor, gates_TA: Tensor, weight_AWD: Tensor, dtype: Any) -> Tensor:
        ctx.save_for_backward(heads_TAW, gates_TA, weight_AWD)
        ctx.dtype = dtype
        gated = heads_TAW.to(dtype) * gates_TA.to(dtype)[..., None]
        return gated.flatten(1) @ weight_AWD.to(dtype).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        heads_TAW, gates_TA, weight_AWD = ctx.saved_tensors
        grad_heads = grad_gates = grad_weight = None
        with torch.autocast(grad_TD.device.type, enabled=False):
            grad, heads = grad_TD.to(ctx.dtype), heads_TAW.to(ctx.dtype)
            gates_TA1 = gates_TA.to(ctx.dtype)[..., None]
            if ctx.needs_input_grad[2]:
                gated = (heads * gates_TA1).flatten(1)
                grad_weight = (gated.T @ grad).view_as(weight_AWD).to(weight_AWD.dtype)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_gated = (grad @ weight_AWD.to(ctx.dtype).flatten(0, 1).T).view_as(heads)
                grad_gates = torch.linalg.vecdot(grad_gated, heads).to(gates_TA.dtype)
                grad_heads = grad_gated.mul_(gates_TA1).to(heads_TAW.dtype)
        return grad_heads, grad_gates, grad_weight, None


def gated_projection(heads_TAW: Tensor, gates_TA: Tensor, weight_AWD: Tensor) -> Tensor:
    """Sum over experts of gate times the projection of the expert's heads.

    Args:
        heads_TAW: [T, A, W] attention outputs.
        gates_TA: [T, A] gates in any floating dtype.
        weight_AWD: [A, W, D] output projections.

    Returns:
        [T, D], in autocast's dtype where autocast is on, otherwise in that of `heads_TAW`.
    """
    dtype = compute_dtype(heads_TAW)
    with torch.autocast(heads_TAW.device.type, enabled=False):
        return _GatedProjection.apply(heads_TAW, gates_TA, weight_AWD, dtype)
