"""Which code computes the MLP experts inside vLLM: this project's own, or vLLM's fused MoE.

DSMOE_VLLM_EXPERTS=auto|own|fused, read when the model is built:

own    the model's own MLP: every policy, removed experts, both MLP types. On CPU its C++ kernel.
fused  vLLM's fused experts, fed with this model's own choice and gates. For top_k alone (one k or one per layer), all
       experts stored, swiglu.
auto   own on CPU, where it is the faster one. Elsewhere fused where it covers the model, else own (no GPU was at hand:
       that choice was never timed).
"""

import os

from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError

VARIABLE = "DSMOE_VLLM_EXPERTS"
CHOICES = ("auto", "own", "fused")


def experts_path(config: DSMoEConfig, device_type: str) -> str:
    """ "own" or "fused".

    Args:
        config: of the model.
        device_type: "cpu", "cuda", ...

    Raises:
        UserError: VARIABLE is none of CHOICES, or asks for fused where that can't compute the model.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE}={choice!r} is unknown; it is one of {', '.join(CHOICES)}")
    reason = not_fusable(config)
    if choice == "fused" and reason is not None:
        raise UserError(f"{VARIABLE}=fused can't run this model: {reason}; use own")
    if choice == "auto":
        return "own" if device_type == "cpu" or reason is not None else "fused"
    return choice


def not_fusable(config: DSMoEConfig) -> str | None:
    """Why vLLM's fused experts can't compute a model, in a few words; None: they can."""
    if config.num_experts == 1:
        return "it has one MLP and no experts"
    if config.mlp_type != "swiglu":
        return f"mlp_type is {config.mlp_type}, vLLM's experts have two input projections"
    for layer in range(config.num_hidden_layers):
        policy = config.routing("mlp", layer)
        if policy["policy"] not in ("top_k", "threshold_top_k"):
            return f"mlp_routing[{layer}] is {policy['policy']}, and vLLM's experts take the same number for every token"
        if config.kept_experts("mlp", layer) is not None:
            return f"layer {layer} has removed experts, and vLLM's layers all have the same number"
    return None
