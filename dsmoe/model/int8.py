"""Weights as 8-bit integers with one factor for each row, for inference alone.

w = scale * q with q from -127 to 127 and scale = max |row| / 127, so an error is at most half a scale. A row of an
input projection gives one hidden unit, a row [D] of an output projection [N, F, D] is multiplied by one hidden unit:
both factors leave the sum. Tokens, gates, routers, norms, embeddings, keys and values keep their type.

Shapes: T tokens, D hidden size, N stored experts, F hidden units of one expert, H = 2F (swiglu) or F (gelu).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dsmoe.errors import UserError
from dsmoe.model.attention import Attention
from dsmoe.model.experts import Experts
from dsmoe.model.kernels import eager, inference_experts


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 numbers and float32 scales of the rows (last dimension) of a matrix or a stack of them.

    Args:
        weight: [..., rows, depth], any floating dtype.

    Returns:
        int8 [..., rows, depth] and float32 [..., rows]; a row of zeros has scale 1, one that isn't finite a scale that
        isn't.
    """
    wide = weight.detach().float()
    scales = wide.abs().amax(-1) / 127
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return (wide / scales[..., None]).round_().to(torch.int8), scales


class _Int8(nn.Module):
    """A cast of the model leaves the scales alone: kernels read them as float32, whatever its weights are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {
            name: buffer for name, buffer in self.named_buffers(recurse=False) if name.endswith("scales")
        }
        super()._apply(fn, recurse)
        for name, scales in before.items():
            moved = getattr(self, name)
            if moved.dtype is not torch.float32:
                setattr(self, name, scales.to(moved.device))
        return self


class Int8Linear(_Int8):
    """A linear layer without bias."""

    weight: Tensor
    scales: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        quantized, scales = quantize_rows(weight)
        self.register_buffer("weight", quantized, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        return functional.linear(x, (self.weight * self.scales[:, None]).to(x.dtype))


class Int8Experts(_Int8):
    """`Experts` without gradients, with the same forward."""

    input_proj: Tensor
    down_proj: Tensor
    up_scales: Tensor
    down_scales: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.mlp_type = experts.mlp_type
        self.layer_idx = experts.layer_idx
        up, up_scales = _quantized_stack(experts.input_proj)
        down, down_scales = _quantized_stack(experts.down_proj)
        for name, tensor in (
            ("input_proj", up), ("down_proj", down), ("up_scales", up_scales), ("down_scales", down_scales)
        ):  # fmt: skip
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x_TD: Tensor, gates_TN: Tensor | None, expert_mask_TN: Tensor | None = None) -> Tensor:
        """See `Experts.forward`."""
        given = (x_TD, gates_TN, expert_mask_TN, self.input_proj, self.down_proj, self.mlp_type)
        return int8_experts(*given, self.up_scales, self.down_scales)


def int8_experts(
    x_TD: Tensor,
    gates_TN: Tensor | None,
    expert_mask_TN: Tensor | None,
    up_NHD: Tensor,
    down_NFD: Tensor,
    mlp_type: str,
    up_scales_NH: Tensor,
    down_scales_NF: Tensor,
) -> Tensor:
    """Sum over the kept experts of gate times expert output; see `kernels.inference.forward`."""
    given = (x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type, up_scales_NH, down_scales_NF)
    y_TD = inference_experts(*given)
    return portable_int8_experts(*given) if y_TD is None else y_TD


def portable_int8_experts(
    x_TD: Tensor,
    gates_TN: Tensor | None,
    expert_mask_TN: Tensor | None,
    up_NHD: Tensor,
    down_NFD: Tensor,
    mlp_type: str,
    up_scales_NH: Tensor,
    down_scales_NF: Tensor,
) -> Tensor:
    """The same in torch operations: one expert at a time in the tokens' type."""
    dtype = x_TD.dtype
    total = torch.zeros(x_TD.shape, dtype=torch.promote_types(dtype, torch.float32), device=x_TD.device)
    for expert in range(up_NHD.shape[0]):
        rows = slice(None) if expert_mask_TN is None else expert_mask_TN[:, expert].nonzero()[:, 0]
        gates = None if gates_TN is None else gates_TN[rows, expert, None].to(dtype)
        up = (up_NHD[expert] * up_scales_NH[expert, :, None]).to(dtype)
        down = (down_NFD[expert] * down_scales_NF[expert, :, None]).to(dtype)
        act = eager.forward((x_TD[rows] @ up.T)[:, None], gates, mlp_type)[:, 0]
        total[rows] += (act @ down).to(total.dtype)
    return total.to(dtype)


@torch.no_grad()
def quantize_int8(model: Any, linear: bool = False) -> Any:
    """Turn the MLP experts of a model into int8, in place and layer by layer; the floating-point ones are freed.

    The model then generates and scores; it can't be trained, and `save_pretrained` refuses it.

    Args:
        model: a dsmoe model, dense twins included.
        linear: also the projections of ordinary attention and an output projection of its own. A mixture of heads
            and a tied output projection stay as they are.

    Returns:
        The model.

    Raises:
        UserError: it has been quantised before.
    """
    if any(isinstance(module, Int8Experts) for module in model.modules()):
        raise UserError("quantize_int8: the model's experts are int8 already")
    for module in list(model.modules()):
        if isinstance(getattr(module, "experts", None), Experts):
            module.experts = Int8Experts(module.experts)
        if linear and isinstance(module, Attention):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(module, name, Int8Linear(getattr(module, name).weight))
    head = getattr(model, "lm_head", None)
    if linear and head is not None and not model.config.tie_word_embeddings:
        model.lm_head = Int8Linear(head.weight)
    model.save_pretrained = _refuse_to_save
    return model


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise UserError(
        "save_pretrained: the experts are int8 in memory alone; save the model before quantize_int8"
    )


def _quantized_stack(weight_NRD: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows`, an expert at a time: a float32 copy of the whole stack would double its memory."""
    quantized = torch.empty(weight_NRD.shape, dtype=torch.int8, device=weight_NRD.device)
    scales = torch.empty(weight_NRD.shape[:2], dtype=torch.float32, device=weight_NRD.device)
    for expert, weight in enumerate(weight_NRD):
        quantized[expert], scales[expert] = quantize_rows(weight)
    return quantized, scales
