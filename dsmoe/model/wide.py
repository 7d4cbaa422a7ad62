"""The dense expert path: all experts of a layer as one wide MLP whose hidden units are gated.

With every expert kept, sum_i g_i * expert_i(x) equals one MLP of N * F hidden units, each multiplied by the gate
of its expert before the down projection. So dense training needs no grouped GEMM at all.

Tokens are taken in blocks: what a GEMM has just written is then still in the cache when the activation reads it, and
large temporaries (which malloc gives back to the system and must fault in again each time) don't arise. With
`recompute` the pre-activations aren't kept for the backward pass: it computes them again, block by block.
Few tokens without gradients are bound by the reading of weights, which a kernel does faster than GEMMs. To torch.compile
without gradients the layer is one opaque operation: what it does depends on the number of tokens.

Shapes: T tokens, D hidden size, N experts, F hidden units of one expert, H = 2F (swiglu) or F (gelu), W = N * F,
C tokens of a block.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsmoe.model.autocast import compute_dtype
from dsmoe.model.kernels import gated_activation, gated_activation_backward, inference_experts
from dsmoe.model.kernels.inference import MOST_TOKENS_OF_ALL_EXPERTS

# A block's pre-activations take about this many bytes, and a block has at least so many tokens: GEMMs of fewer rows
# are slower, and each block adds to the weights' gradients.
_BLOCK_BYTES = 16 << 20
_MIN_BLOCK_TOKENS = {"cpu": 512}
_MIN_BLOCK_TOKENS_ELSEWHERE = 4096


class _Setting(NamedTuple):
    """What doesn't change between forward and backward.

    Attributes:
        mlp_type: "swiglu" or "gelu".
        dtype: that of the GEMMs.
        down_layout: "NFD" or "NDF", the dimensions of the output projections.
        keep: keep the pre-activations for the backward pass.
        blocks: the blocks of tokens.
    """

    mlp_type: str
    dtype: torch.dtype
    down_layout: str
    keep: bool
    blocks: Sequence[slice]


class _WideExperts(torch.autograd.Function):
    """Saves x, gates, the Parameters themselves (never views or casts: ZeRO-3 must be able to free them) and, without
    recompute, the pre-activations.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gates_TN: Tensor | None, up_NHD: Tensor, down: Tensor, setting: _Setting
    ) -> Tensor:
        ctx.in_dtype, ctx.gates_dtype = x_TD.dtype, None if gates_TN is None else gates_TN.dtype
        x = x_TD.to(setting.dtype)
        gates = None if gates_TN is None else gates_TN.to(setting.dtype)
        up_WD = up_NHD.to(setting.dtype).flatten(0, 1)
        down_WD = _down_matrix(down, setting)
        keep = any(ctx.needs_input_grad) and setting.keep
        kept = []

        def block(rows: slice, out: Tensor | None) -> Tensor:
            h_CNH = (x[rows] @ up_WD.T).unflatten(-1, up_NHD.shape[:2])
            if keep:
                kept.append(h_CNH)
            act_CNF = gated_activation(h_CNH, _rows(gates, rows), setting.mlp_type)
            return torch.mm(act_CNF.flatten(1), down_WD, out=out)

        y_TD = _by_blocks(block, x, setting.blocks)
        ctx.setting = setting
        ctx.save_for_backward(x, gates, up_NHD, down, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        # without this the products below would be cast under an autocast region around backward()
        with torch.autocast(grad_TD.device.type, enabled=False):
            return _backward(ctx, grad_TD)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    x, gates, up_NHD, down, *kept = ctx.saved_tensors
    setting: _Setting = ctx.setting
    needs_x, _, needs_up, needs_down, _ = ctx.needs_input_grad
    num_experts, width = up_NHD.shape[0], down.shape[setting.down_layout.index("F")]
    grad = grad_TD.to(setting.dtype)
    up_WD = up_NHD.to(setting.dtype).flatten(0, 1)
    down_WD = _down_matrix(down, setting)
    grad_up, grad_down = _Sum(up_NHD.dtype, setting), _Sum(down.dtype, setting)
    grad_gates = []

    def block(rows: slice, out: Tensor | None) -> Tensor | None:
        h_CNH = kept.pop(0) if kept else (x[rows] @ up_WD.T).unflatten(-1, up_NHD.shape[:2])
        grad_act = (grad[rows] @ down_WD.T).unflatten(-1, (num_experts, width))
        grad_h, grad_gate, act = gated_activation_backward(
            grad_act, h_CNH, _rows(gates, rows), setting.mlp_type
        )
        grad_gates.append(grad_gate)
        grad_h = grad_h.flatten(1)
        if needs_up:
            grad_up.add_product(grad_h.T, x[rows])
        if needs_down and setting.down_layout == "NFD":
            grad_down.add_product(act.flatten(1).T, grad[rows])
        elif needs_down:
            grad_down.add_product(grad[rows].T, act.flatten(1))
        return torch.mm(grad_h, up_WD, out=out) if needs_x else None

    grad_x = _by_blocks(block, x, setting.blocks)
    return (
        None if grad_x is None else grad_x.to(ctx.in_dtype),
        None if gates is None else torch.cat(grad_gates).to(ctx.gates_dtype),
        grad_up.total.view_as(up_NHD) if needs_up else None,
        _down_shape(grad_down.total, down, setting) if needs_down else None,
        None,
    )


def _rows(tensor: Tensor | None, rows: slice) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def _by_blocks(
    block: Callable[[slice, Tensor | None], Tensor | None], x_TD: Tensor, blocks: Sequence[slice]
) -> Tensor | None:
    """Run `block` for each block of tokens; its results [C, D] together, written into place."""
    if len(blocks) == 1:
        return block(blocks[0], None)
    whole_TD = torch.empty_like(x_TD)
    results = [block(rows, whole_TD[rows]) for rows in blocks]
    return None if results[0] is None else whole_TD


class _Sum:
    """A sum of matrix products over the blocks, taken in at least float32 as one GEMM over all tokens would."""

    def __init__(self, dtype: torch.dtype, setting: _Setting) -> None:
        self.dtype = dtype
        self.left = len(setting.blocks)
        self.total: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b; after the last block `total` has the wanted dtype."""
        self.left -= 1
        dtype = torch.promote_types(a.dtype, torch.float32)
        if self.total is None:
            self.total = (a @ b).to(dtype if self.left else self.dtype)
        elif dtype == a.dtype:
            torch.addmm(self.total, a, b, out=self.total)  # torch's counter of operations misses addmm_
        else:
            self.total.add_(a @ b)
        if not self.left:
            self.total = self.total.to(self.dtype)


def _down_matrix(down: Tensor, setting: _Setting) -> Tensor:
    """[W, D], of output projections [N, F, D] without a copy, of [N, D, F] by copying runs of F numbers."""
    down = down.to(setting.dtype)
    if setting.down_layout == "NFD":
        return down.flatten(0, 1)
    return down.transpose(0, 1).flatten(1).T


def _down_shape(grad: Tensor, down: Tensor, setting: _Setting) -> Tensor:
    """A gradient [W, D] ("NFD") or [D, W] ("NDF") in the shape of the output projections."""
    if setting.down_layout == "NFD":
        return grad.view_as(down)
    num_experts, hidden, width = down.shape
    return grad.view(hidden, num_experts, width).transpose(0, 1)


def _blocks(num_tokens: int, block_tokens: int) -> list[slice]:
    """Blocks of equal size, but for rounding, of at most `block_tokens` tokens."""
    count = max(1, -(-num_tokens // block_tokens))
    size = max(1, -(-num_tokens // count))
    return [slice(start, min(start + size, num_tokens)) for start in range(0, max(num_tokens, 1), size)]


def _default_block_tokens(x_TD: Tensor, h_width: int, dtype: torch.dtype, recompute: bool) -> int:
    on_cpu = x_TD.device.type in _MIN_BLOCK_TOKENS
    # a compiler fuses by itself, and a GPU has neither page faults nor a cache of this size
    if torch.compiler.is_compiling() or not (on_cpu or recompute):
        return max(1, x_TD.shape[0])
    smallest = _MIN_BLOCK_TOKENS.get(x_TD.device.type, _MIN_BLOCK_TOKENS_ELSEWHERE)
    return max(smallest, _BLOCK_BYTES // (h_width * dtype.itemsize))


def wide_experts(
    x_TD: Tensor,
    gates_TN: Tensor | None,
    up_NHD: Tensor,
    down: Tensor,
    mlp_type: str,
    *,
    down_layout: str = "NFD",
    recompute: bool = False,
    block_tokens: int | None = None,
) -> Tensor:
    """Sum over all experts of gate times expert output.

    Args:
        x_TD: [T, D] tokens.
        gates_TN: [T, N] gates in any floating dtype, or None for gates of one (the dense twin).
        up_NHD: [N, H, D] input projections; for swiglu an expert's gate rows come before its up rows.
        down: [N, F, D] output projections, or [N, D, F] (see `down_layout`).
        mlp_type: "swiglu" or "gelu".
        down_layout: "NFD", or "NDF" as in transformers, which costs a copy of `down`.
        recompute: keep x and the gates alone for the backward pass, which then computes the pre-activations again:
            11 GEMMs of size T * D * W instead of 9.
        block_tokens: largest number of tokens of a block; None: chosen by size.

    Returns:
        [T, D], in autocast's dtype where autocast is on, otherwise in that of `x_TD`.

    Source:
        arXiv 2404.05567, section 3; the identity is derived above.
    """
    assert down_layout in ("NFD", "NDF"), down_layout
    dtype = compute_dtype(x_TD)
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        return torch.ops.dsmoe.wide_experts(x_TD.to(dtype), gates_TN, up_NHD, down, mlp_type, down_layout)
    if x_TD.shape[0] <= MOST_TOKENS_OF_ALL_EXPERTS and not torch.compiler.is_compiling():
        down_NFD = down if down_layout == "NFD" else down.transpose(1, 2)
        y_TD = inference_experts(x_TD.to(dtype), gates_TN, None, up_NHD, down_NFD, mlp_type)
        if y_TD is not None:
            return y_TD
    if block_tokens is None:
        block_tokens = _default_block_tokens(x_TD, up_NHD.shape[0] * up_NHD.shape[1], dtype, recompute)
    # asked here: inside of an autograd.Function gradients always are off, and its inputs need some all the same
    keep = torch.is_grad_enabled() and not recompute
    setting = _Setting(mlp_type, dtype, down_layout, keep, _blocks(x_TD.shape[0], block_tokens))
    with torch.autocast(x_TD.device.type, enabled=False):
        return _WideExperts.apply(x_TD, gates_TN, up_NHD, down, setting)


@torch.library.custom_op("dsmoe::wide_experts", mutates_args=())
def _operation(
    x_TD: Tensor, gates_TN: Tensor | None, up_NHD: Tensor, down: Tensor, mlp_type: str, down_layout: str
) -> Tensor:
    return wide_experts(x_TD, gates_TN, up_NHD, down, mlp_type, down_layout=down_layout)


@_operation.register_fake
def _(
    x_TD: Tensor, gates_TN: Tensor | None, up_NHD: Tensor, down: Tensor, mlp_type: str, down_layout: str
) -> Tensor:
    return torch.empty_like(x_TD)
