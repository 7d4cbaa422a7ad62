"""The dense expert path for stock transformers models, as the experts implementation "dsmoe_wide".

`import dsmoe`, then `model.set_experts_implementation("dsmoe_wide")`: the experts of an OLMoE, Qwen3-MoE or any model
of the same form are computed as one wide MLP. All experts are computed for every token, whatever num_experts_per_tok
says: with num_experts_per_tok = num_experts that is dense training at a dense model's cost; with fewer the results are
still right (the others' gates are zero) and cost as much as with all.

Shapes: T tokens, D hidden size, N experts, K experts of a token, F hidden units of one expert.
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from dsmoe.errors import UserError
from dsmoe.model.wide import wide_experts

NAME = "dsmoe_wide"

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
    mlp_type = _mlp_type(self)
    up_NHD = self.gate_up_proj if mlp_type == "swiglu" else self.up_proj
    gates_TN = top_k_weights.new_zeros(top_k_weights.shape[0], up_NHD.shape[0])
    gates_TN = gates_TN.scatter(1, top_k_index, top_k_weights)
    out_TD = wide_experts(
        hidden_states, gates_TN, up_NHD, self.down_proj, mlp_type,
        down_layout="NDF", recompute=getattr(self, "recompute", False),
    )  # fmt: skip
    return out_TD.to(hidden_states.dtype)


def _mlp_type(module: Any) -> str:
    """ "swiglu" or "gelu"; refuses every other form of experts."""
    for name, value in _COVERED.items():
        found = getattr(module, name, value)
        if found != value:
            raise _not_covered(module, f"{name} is {found}, and it covers {value}")
    gated = getattr(module, "has_gate", True)
    if gated and getattr(type(module), "_apply_gate", _default_apply_gate) is not _default_apply_gate:
        raise _not_covered(module, "it combines gate and up rows in a way of its own")
    wanted = "silu" if gated else "gelu"
    # several classes compute silu; config names say which the module has
    if not isinstance(module.act_fn, (type(ACT2FN[wanted]), nn.SiLU if gated else nn.GELU)):
        raise _not_covered(
            module, f"its activation is {type(module.act_fn).__name__}, and it covers {wanted}"
        )
    if getattr(module.act_fn, "approximate", "none") != "none":
        raise _not_covered(module, f"its gelu is the {module.act_fn.approximate} approximation")
    return "swiglu" if gated else "gelu"


def _not_covered(module: Any, why: str) -> UserError:
    return UserError(
        f'experts implementation "{NAME}" cannot run {type(module).__name__}: {why}; '
        'use "grouped_mm" or "eager" for this model'
    )


ALL_EXPERTS_FUNCTIONS.register(NAME, wide_experts_forward)
