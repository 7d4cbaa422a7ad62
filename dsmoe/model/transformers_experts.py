"""The expert paths for stock transformers models, as experts implementations.

`import dsmoe`, then `model.set_experts_implementation(...)`, for an OLMoE, Qwen3-MoE or any model of the same form:

"dsmoe_wide"     one wide MLP. All experts are computed for every token, whatever num_experts_per_tok says: with
                 num_experts_per_tok = num_experts that is dense training at a dense model's cost; with fewer the
                 results are still right (the others' gates are zero) and cost as much as with all.
"dsmoe_grouped"  the kept experts alone, for inference (and right, but no faster than transformers', in training).

The kernels want an expert's output vectors as contiguous rows, and transformers keeps them as columns. So the first
forward pass of "dsmoe_grouped" without gradients, in eval mode, lays `down_proj` out anew in memory, once: shape,
values, the Parameter itself and what is saved stay the same, its strides don't.

Shapes: T tokens, D hidden size, N experts, K experts of a token, F hidden units of one expert.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from dsmoe.errors import UserError
from dsmoe.model.grouped import grouped_experts
from dsmoe.model.kernels import inference, inference_kernel
from dsmoe.model.wide import wide_experts

NAME = "dsmoe_wide"
NAME_GROUPED = "dsmoe_grouped"

# attribute of a stock experts module, the value that the wide path covers
_COVERED = {
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}


def wide_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of a stock experts module.

    Args:
        self: the module, with `gate_up_proj` [N, 2F, D] (or `up_proj` [N, F, D]) and `down_proj` [N, D, F].
        hidden_states: [T, D].
        top_k_index: [T, K] int64, without repetition in a row.
        top_k_weights: [T, K] gates.

    Returns:
        [T, D] in the dtype of `hidden_states`.

    Raises:
        UserError: the module is of a form that the wide path doesn't cover.
    """
    mlp_type = _mlp_type(self, NAME)
    up_NHD = self.gate_up_proj if mlp_type == "swiglu" else self.up_proj
    gates_TN = top_k_weights.new_zeros(top_k_weights.shape[0], up_NHD.shape[0])
    gates_TN = gates_TN.scatter(1, top_k_index, top_k_weights)
    out_TD = wide_experts(
        hidden_states, gates_TN, up_NHD, self.down_proj, mlp_type,
        down_layout="NDF", recompute=getattr(self, "recompute", False),
    )  # fmt: skip
    return out_TD.to(hidden_states.dtype)


def grouped_experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Forward of a stock experts module, of the kept experts alone.

    Args:
        self: the module, with `gate_up_proj` [N, 2F, D] (or `up_proj` [N, F, D]) and `down_proj` [N, D, F].
        hidden_states: [T, D].
        top_k_index: [T, K] int64, without repetition in a row.
        top_k_weights: [T, K] gates.

    Returns:
        [T, D] in the dtype of `hidden_states`.

    Raises:
        UserError: the module is of a form that this path doesn't cover.
    """
    mlp_type = _mlp_type(self, NAME_GROUPED)
    up_NHD = self.gate_up_proj if mlp_type == "swiglu" else self.up_proj
    if not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
        _lay_out_in_rows(self.down_proj)
    gates_TN = top_k_weights.new_zeros(top_k_weights.shape[0], up_NHD.shape[0])
    expert_mask_TN = torch.zeros_like(gates_TN, dtype=torch.bool).scatter_(1, top_k_index, True)
    gates_TN = gates_TN.scatter(1, top_k_index, top_k_weights)
    down_NFD = self.down_proj.transpose(1, 2)
    out_TD = grouped_experts(hidden_states, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type)
    return out_TD.to(hidden_states.dtype)


def _lay_out_in_rows(down_proj: Any) -> None:
    """Give a contiguous Parameter [N, D, F] the memory layout [N, F, D], where a kernel has use for that."""
    if not down_proj.is_contiguous() or min(down_proj.shape[1:]) == 1:
        return
    usable = type(down_proj) is nn.Parameter and down_proj.is_cpu and down_proj.dtype in inference.DTYPES
    if usable and inference_kernel("cpu") is not None:
        with torch.inference_mode(False), torch.no_grad():
            down_proj.data = down_proj.detach().transpose(1, 2).contiguous().transpose(1, 2)


@functools.cache
def _activation_types(name: str) -> tuple[type, ...]:
    """Several classes compute silu; config names say which a module has."""
    return type(ACT2FN[name]), nn.SiLU if name == "silu" else nn.GELU


def _mlp_type(module: Any, implementation: str) -> str:
    """ "swiglu" or "gelu"; refuses every other form of experts."""
    for name, value in _COVERED.items():
        found = getattr(module, name, value)
        if found != value:
            raise _not_covered(module, implementation, f"{name} is {found}, and it covers {value}")
    gated = getattr(module, "has_gate", True)
    if gated and getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate:
        raise _not_covered(module, implementation, "it combines gate and up rows in a way of its own")
    wanted = "silu" if gated else "gelu"
    if not isinstance(module.act_fn, _activation_types(wanted)):
        found = type(module.act_fn).__name__
        raise _not_covered(module, implementation, f"its activation is {found}, and it covers {wanted}")
    approximate = getattr(module.act_fn, "approximate", "none")
    if approximate != "none":
        raise _not_covered(module, implementation, f"its gelu is the {approximate} approximation")
    return "swiglu" if gated else "gelu"


def _not_covered(module: Any, implementation: str, why: str) -> UserError:
    return UserError(
        f'experts implementation "{implementation}" cannot run {type(module).__name__}: {why}; '
        'use "grouped_mm" or "eager" for this model'
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, wide_experts_forward)
ALL_EXPERTS_FUNCTIONS.register(NAME_GROUPED, grouped_experts_forward)
