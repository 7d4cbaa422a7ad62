"""The dense expert path: all experts of a layer as one wide MLP whose hidden units are gated.

With every expert kept, sum_i g_i * expert_i(x) equals one MLP of N * F hidden units, each multiplied by the gate
of its expert before the down projection. So dense training needs no grouped GEMM at all.

Shapes: T tokens, D hidden size, N experts, F hidden units of one expert, H = 2F (swiglu) or F (gelu).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.model.kernels import gated_activation, gated_activation_backward


class _WideExperts(torch.autograd.Function):
    """Saves x, the pre-activations and the Parameters themselves (never views: ZeRO-3 must be able to free them)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TN: Tensor | None,
        up_NHD: Tensor,
        down_NFD: Tensor,
        mlp_type: str,
        dtype: Any,
    ) -> Tensor:
        x = x_TD.to(dtype)
        gates = None if gates_TN is None else gates_TN.to(dtype)
        num_experts, width, _ = up_NHD.shape
        h_TNH = (x @ up_NHD.to(dtype).flatten(0, 1).T).unflatten(-1, (num_experts, width))
        ctx.save_for_backward(x, gates, up_NHD, down_NFD, h_TNH)
        ctx.mlp_type, ctx.dtype, ctx.in_dtype = mlp_type, dtype, x_TD.dtype
        ctx.gates_dtype = None if gates_TN is None else gates_TN.dtype
        return gated_activation(h_TNH, gates, mlp_type).flatten(1) @ down_NFD.to(dtype).flatten(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x, gates, up_NHD, down_NFD, h_TNH = ctx.saved_tensors
        # without this the products below would be cast under an autocast region around backward()
        with torch.autocast(x.device.type, enabled=False):
            grad = grad_TD.to(ctx.dtype)
            grad_act = grad @ down_NFD.to(ctx.dtype).flatten(0, 1).T
            grad_h, grad_gates, act = gated_activation_backward(
                grad_act.unflatten(-1, down_NFD.shape[:2]), h_TNH, gates, ctx.mlp_type
            )
            grad_h = grad_h.flatten(1)
            grad_x = grad_up = grad_down = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad_h @ up_NHD.to(ctx.dtype).flatten(0, 1)).to(ctx.in_dtype)
            if ctx.needs_input_grad[2]:
                grad_up = (grad_h.T @ x).view_as(up_NHD).to(up_NHD.dtype)
            if ctx.needs_input_grad[3]:
                grad_down = (act.flatten(1).T @ grad).view_as(down_NFD).to(down_NFD.dtype)
        if grad_gates is not None:
            grad_gates = grad_gates.to(ctx.gates_dtype)
        return grad_x, grad_gates, grad_up, grad_down, None, None


def wide_experts(
    x_TD: Tensor, gates_TN: Tensor | None, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    """Sum over all experts of gate times expert output.

    Args:
        x_TD: [T, D] tokens.
        gates_TN: [T, N] gates in any floating dtype, or None for gates of one (the dense twin).
        up_NHD: [N, H, D] input projections; for swiglu an expert's gate rows come before its up rows.
        down_NFD: [N, F, D] output projections.
        mlp_type: "swiglu" or "gelu".

    Returns:
        [T, D], in autocast's dtype where autocast is on, otherwise in that of `x_TD`.

    Source:
        arXiv 2404.05567, section 3; the identity is derived above.
    """
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    with torch.autocast(device, enabled=False):
        return _WideExperts.apply(x_TD, gates_TN, up_NHD, down_NFD, mlp_type, dtype)
