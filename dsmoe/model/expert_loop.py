"""The sparse expert path as a loop over experts, with gradients.

An expert's tokens are gathered when it is their turn, in the backward pass again, so that what one product writes is
still in the cache when the next one reads it. Kept for the backward pass are tokens, gates, places and pre-activations:
H numbers a pair. Blocks are padded (see `dsmoe.model.pairs`).

Shapes: T tokens, R rows (pairs and padding), C rows of an expert, N experts, D hidden size, F hidden units of one expert,
H = 2F (swiglu) or F (gelu).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.model.kernels import gated_activation, gated_activation_backward
from dsmoe.model.pairs import PaddedPairs, blocks, padded_pairs, sum_of_pairs


class _LoopedExperts(torch.autograd.Function):
    """Saves the Parameters themselves, never casts of them (ZeRO-3 must be able to free them)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gates_TN: Tensor,
        mask_TN: Tensor,
        up_NHD: Tensor,
        down_NFD: Tensor,
        mlp_type: str,
    ) -> Tensor:
        dtype = x_TD.dtype
        pairs = padded_pairs(mask_TN)
        num_rows = pairs.token_R.shape[0]
        gates_R = x_TD.new_zeros(num_rows)
        gates_R[pairs.place_P] = gates_TN[mask_TN].to(dtype)
        up, down = up_NHD.to(dtype), down_NFD.to(dtype)
        h_RH = x_TD.new_empty(num_rows, up.shape[1])
        y_RD = x_TD.new_empty(num_rows, x_TD.shape[1])
        for expert, rows in blocks(pairs.counts):
            torch.mm(x_TD.index_select(0, pairs.token_R[rows]), up[expert].T, out=h_RH[rows])
            act_C1F = gated_activation(h_RH[rows, None], gates_R[rows, None], mlp_type)
            torch.mm(act_C1F[:, 0], down[expert], out=y_RD[rows])
        ctx.counts, ctx.mlp_type, ctx.gates_dtype = pairs.counts, mlp_type, gates_TN.dtype
        kept = (h_RH,) if any(ctx.needs_input_grad) else ()
        ctx.save_for_backward(x_TD, mask_TN, *pairs[1:], gates_R, up_NHD, down_NFD, *kept)
        return sum_of_pairs(y_RD, pairs.place_P, pairs.begin_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        # without this the products below would be cast under an autocast region around backward()
        with torch.autocast(grad_TD.device.type, enabled=False):
            return _backward(ctx, grad_TD)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    x_TD, mask_TN, *places, gates_R, up_NHD, down_NFD, h_RH = ctx.saved_tensors
    pairs = PaddedPairs(ctx.counts, *places)
    needs_x, needs_gates, _, needs_up, needs_down, _ = ctx.needs_input_grad
    dtype = x_TD.dtype
    grad_TD = grad_TD.to(dtype)
    up, down = up_NHD.to(dtype), down_NFD.to(dtype)
    grad_x_RD = x_TD.new_empty(len(pairs.token_R), x_TD.shape[1]) if needs_x else None
    grad_up = torch.zeros_like(up_NHD) if needs_up else None
    grad_down = torch.zeros_like(down_NFD) if needs_down else None
    grad_gates_R = torch.empty_like(gates_R)
    for expert, rows in blocks(pairs.counts):
        grad_CD = grad_TD.index_select(0, pairs.token_R[rows])
        grad_act_C1F = (grad_CD @ down[expert].T)[:, None]
        grad_h_C1H, grad_gates_R[rows, None], act_C1F = gated_activation_backward(
            grad_act_C1F, h_RH[rows, None], gates_R[rows, None], ctx.mlp_type
        )
        grad_h_CH = grad_h_C1H[:, 0]
        if grad_up is not None:
            grad_up[expert] = grad_h_CH.T @ x_TD.index_select(0, pairs.token_R[rows])
        if grad_down is not None:
            grad_down[expert] = act_C1F[:, 0].T @ grad_CD
        if grad_x_RD is not None:
            torch.mm(grad_h_CH, up[expert], out=grad_x_RD[rows])
    grad_x = None if grad_x_RD is None else sum_of_pairs(grad_x_RD, pairs.place_P, pairs.begin_T)
    grad_gates = None
    if needs_gates:
        grad_gates = torch.zeros(mask_TN.shape, dtype=ctx.gates_dtype, device=mask_TN.device)
        grad_gates[mask_TN] = grad_gates_R[pairs.place_P].to(ctx.gates_dtype)
    return grad_x, grad_gates, None, grad_up, grad_down, None


def looped_experts(
    x_TD: Tensor, gates_TN: Tensor, expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    """Sum over the kept experts of gate times expert output, computed in the dtype of `x_TD`.

    Args:
        x_TD: [T, D] tokens.
        gates_TN: [T, N] gates in any floating dtype; only those of kept pairs are read.
        expert_mask_TN: [T, N] bool, which experts each token keeps.
        up_NHD: [N, H, D] input projections.
        down_NFD: [N, F, D] output projections.
        mlp_type: "swiglu" or "gelu".

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    with torch.autocast(x_TD.device.type, enabled=False):
        return _LoopedExperts.apply(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
