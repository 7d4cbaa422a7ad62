"""The sparse expert path: only the kept (token, expert) pairs are computed.

Without gradients a kernel does it in one call (see `dsmoe.model.kernels.inference`). Otherwise, and where that kernel
can't be had, pairs are sorted by expert, so that each expert sees one contiguous block of rows: grouped products of
torch on CUDA (untested there), a loop over experts elsewhere (see `dsmoe.model.expert_loop`), or where experts are so
narrow that the loop takes longer than it saves, all of them as one wide MLP with gates of zero. To torch.compile the
layer is one opaque operation, with gradients a break in the graph: its shapes depend on the mask's values.

Shapes: T tokens, P kept pairs, N experts, D hidden size, F hidden units of one expert, H = 2F (swiglu) or F.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.model.autocast import compute_dtype
from dsmoe.model.expert_loop import looped_experts
from dsmoe.model.kernels import eager, inference_experts
from dsmoe.model.pairs import blocks, kept_pairs
from dsmoe.model.wide import wide_experts

# Rows of narrow blocks cost the loop 1 + NARROW / F times what they cost in one wide product, at 2 bytes a number and at
# more. Measured on one core with AVX-512 and AMX, F from 16 to 256 and shares from a tenth to a half: the faster of
# the two is chosen but where they are within a third of each other.
_NARROW = {True: 64, False: 24}
# public from torch 2.10 on
_grouped_mm: Callable[..., Tensor] | None = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)


class _GroupedLinear(torch.autograd.Function):
    """y[block e] = x[block e] @ W[e]^T ("out_in") or x[block e] @ W[e] ("in_out")."""

    @staticmethod
    def forward(ctx: Any, x_PI: Tensor, weight: Tensor, counts: Sequence[int], layout: str) -> Tensor:
        ctx.save_for_backward(x_PI, weight)
        ctx.counts, ctx.layout = counts, layout
        size = weight.shape[1] if layout == "out_in" else weight.shape[2]
        y_PO = x_PI.new_empty(x_PI.shape[0], size)
        for expert, rows in blocks(counts):
            w = weight[expert].to(x_PI.dtype)
            torch.mm(x_PI[rows], w.T if layout == "out_in" else w, out=y_PO[rows])
        return y_PO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, ...]:
        x_PI, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x_PI)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        with torch.autocast(x_PI.device.type, enabled=False):
            grad = grad_PO.to(x_PI.dtype)
            for expert, rows in blocks(ctx.counts):
                w = weight[expert].to(x_PI.dtype)
                torch.mm(grad[rows], w if ctx.layout == "out_in" else w.T, out=grad_x[rows])
                if grad_weight is not None:
                    left, right = (grad, x_PI) if ctx.layout == "out_in" else (x_PI, grad)
                    grad_weight[expert] = left[rows].T @ right[rows]
        return grad_x, grad_weight, None, None


def uses_grouped_mm(x_PI: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product does it: half precision on CUDA, rows of whole 16 bytes, as it asks for."""
    return (
        x_PI.is_cuda
        and x_PI.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[1] % 8 == 0
        and weight.shape[2] % 8 == 0
        and _has_grouped_mm(x_PI.get_device())
    )


@functools.cache
def _has_grouped_mm(device: int) -> bool:
    """Whether this torch has it, and the GPU of this number: Ampere or newer."""
    return _grouped_mm is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def grouped_linear(x_PI: Tensor, weight: Tensor, counts_N: Tensor, layout: str) -> Tensor:
    """Multiply each expert's block of rows by that expert's matrix.

    Args:
        x_PI: [P, I] rows, sorted by expert.
        weight: [N, O, I] (layout "out_in") or [N, I, O] (layout "in_out"); cast to the dtype of `x_PI`.
        counts_N: [N] int64, rows of each expert; their sum is P.
        layout: as above.

    Returns:
        [P, O] in the dtype of `x_PI`.
    """
    with torch.autocast(x_PI.device.type, enabled=False):
        if uses_grouped_mm(x_PI, weight):
            # one launch, and the host never waits for the counts
            ends_N = counts_N.cumsum(0, dtype=torch.int32)
            weight = weight.to(x_PI.dtype)
            weight_NIO = weight.transpose(1, 2) if layout == "out_in" else weight
            assert _grouped_mm is not None
            return _grouped_mm(x_PI, weight_NIO, offs=ends_N)
        return _GroupedLinear.apply(x_PI, weight, counts_N.tolist(), layout)


def grouped_experts(
    x_TD: Tensor, gates_TN: Tensor, expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    """Sum over the kept experts of gate times expert output; dropped experts cost nothing.

    Args:
        x_TD: [T, D] tokens.
        gates_TN: [T, N] gates; only those of kept pairs are read.
        expert_mask_TN: [T, N] bool, which experts each token keeps.
        up_NHD: [N, H, D] input projections.
        down_NFD: [N, F, D] output projections.
        mlp_type: "swiglu" or "gelu".

    Returns:
        [T, D], in autocast's dtype where autocast is on, otherwise in that of `x_TD`.
    """
    x_TD = x_TD.to(compute_dtype(x_TD))
    if torch.compiler.is_compiling():
        compute = _uncompiled if torch.is_grad_enabled() else torch.ops.dsmoe.grouped_experts
        return compute(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
    y_TD = inference_experts(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
    if y_TD is None:
        y_TD = _portable(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
    return y_TD


def _portable(
    x_TD: Tensor, gates_TN: Tensor, expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    # on a GPU each step of that loop would have the host wait; padding is for oneDNN only
    if not x_TD.is_cpu or (uses_grouped_mm(x_TD, up_NHD) and uses_grouped_mm(x_TD, down_NFD)):
        return batched_experts(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
    if torch.is_grad_enabled() and wide_is_faster(_share(expert_mask_TN), down_NFD.shape[1], x_TD.dtype):
        # of dropped experts nothing is read, so nothing that isn't finite either
        gates_TN = gates_TN.where(expert_mask_TN, 0)
        return wide_experts(x_TD, gates_TN, up_NHD, down_NFD, mlp_type)
    return looped_experts(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)


def _share(mask_TN: Tensor) -> float:
    return mask_TN.sum().item() / max(1, mask_TN.numel())


def wide_is_faster(share: float, width: int, dtype: torch.dtype) -> bool:
    """Whether all experts as one wide MLP take less time in training on CPU than the kept ones in turn.

    Args:
        share: of the pairs that are kept.
        width: F.
        dtype: of the products.
    """
    return share * (1 + _NARROW[dtype.itemsize <= 2] / width) > 1


_uncompiled = torch.compiler.disable(_portable)


def batched_experts(
    x_TD: Tensor, gates_TN: Tensor, expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    """`grouped_experts` with each projection of all experts at once; arguments and result as there."""
    dtype = x_TD.dtype
    with torch.autocast(x_TD.device.type, enabled=False):
        token_P, expert_P, counts_N = kept_pairs(expert_mask_TN)
        x_PD = x_TD[token_P]
        gates_P = gates_TN[token_P, expert_P].to(dtype)
        h_PH = grouped_linear(x_PD, up_NHD, counts_N, "out_in")
        act_PF = eager.forward(h_PH[:, None], gates_P[:, None], mlp_type)[:, 0]
        y_PD = grouped_linear(act_PF, down_NFD, counts_N, "in_out")
        # sums of half-precision outputs are taken in float32, as a wide GEMM does
        total = torch.zeros(x_TD.shape, dtype=torch.promote_types(dtype, torch.float32), device=x_TD.device)
        return total.index_add(0, token_P, y_PD.to(total.dtype)).to(dtype)


# the host reads how many pairs each expert has, which no captured graph can
@torch.library.custom_op("dsmoe::grouped_experts", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _operation(
    x_TD: Tensor, gates_TN: Tensor, expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    given = (x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
    y_TD = inference_experts(*given)
    return _portable(*given) if y_TD is None else y_TD


@_operation.register_fake
def _(
    x_TD: Tensor, gates_TN: Tensor, expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor, mlp_type: str
) -> Tensor:
    return torch.empty_like(x_TD)
