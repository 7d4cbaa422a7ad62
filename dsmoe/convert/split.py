"""A dense model cut into a DS-MoE that computes the same function.

An MLP is a sum over its hidden units, so any partition of them into N experts adds up to it, if all gates are 1. A
DS-MoE's routers start at zero: every expert has p = 1/N, and with the default scale a gate of 1 (see `mlp_gate_scale`).

Shapes: F hidden units of the dense MLP, N experts, C = F / N, D hidden size.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dsmoe.config import DSMoEConfig
from dsmoe.config.run import ModelSettings
from dsmoe.convert.assignment import assign_units
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM


def split_config(
    config: DSMoEConfig, num_experts: int, gate_normalization: str, top_k: int | None = None
) -> DSMoEConfig:
    """The configuration of the DS-MoE or SMoE.

    Args:
        config: of the dense model.
        num_experts: N.
        gate_normalization: of the result.
        top_k: make an SMoE that trains with so many experts a token; None: a DS-MoE.

    Raises:
        UserError: the model is not dense, N is no divisor of its hidden units, or K is none of 1 to N.
    """
    if config.kind != "dense":
        raise UserError(
            f"the model's kind is {config.kind!r}; only a dense model can be split (it has experts already)"
        )
    width = config.intermediate_size
    if num_experts < 2 or width % num_experts:
        near = sorted((n for n in range(2, width + 1) if width % n == 0), key=lambda n: abs(n - num_experts))
        raise UserError(
            f"--num-experts {num_experts}: must divide the {width} hidden units of the MLPs; the nearest that do are "
            f"{', '.join(map(str, sorted(near[:3])))}"
        )
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelSettings)}
    fields |= {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    fields |= {
        "kind": "dsmoe" if top_k is None else "smoe",
        "num_experts": num_experts,
        "gate_normalization": gate_normalization,
        # a dense twin has no router, whatever its config says of one
        "router_type": "linear",
        "router_hidden_size": 0,
        "rope_parameters": config.rope_parameters,
        # follow from the number of experts
        **dict.fromkeys(("moe_intermediate_size", "mlp_gate_scale", "mlp_kept_experts")),
        "mlp_routing": None if top_k is None else {"policy": "top_k", "k": top_k},
    }
    return DSMoEConfig(**fields)


@torch.no_grad()
def split_dense(
    model: DSMoEForCausalLM,
    num_experts: int,
    assignment: str = "contiguous",
    gate_normalization: str = "l2",
    seed: int = 0,
    top_k: int | None = None,
) -> DSMoEForCausalLM:
    """Cut the MLPs of a dense model into experts.

    Args:
        model: of kind "dense"; it is left as it is, and other weights than those of the MLPs are shared with it.
        num_experts: N.
        assignment: one of ASSIGNMENTS.
        gate_normalization: of the result.
        seed: of the assignment and of an SMoE's routers.
        top_k: make an SMoE that trains with so many experts a token; its routers are drawn at random, as zeros would
            send every token to the same experts.

    Returns:
        The model in evaluation mode, with the dtype of `model`: a DS-MoE is the same function up to rounding.

    Raises:
        UserError: as `split_config`.
    """
    config = split_config(model.config, num_experts, gate_normalization, top_k)
    weights: dict[str, Tensor] = {
        name: value for name, value in model.state_dict().items() if ".mlp." not in name
    }
    generator = torch.Generator().manual_seed(seed)
    std = config.router_initializer_range or config.initializer_range
    for index, layer in enumerate(model.model.layers):
        made = _split_layer(layer.mlp.experts, num_experts, assignment, seed + index)
        if top_k is not None:
            drawn = torch.empty_like(made["router.weight"], device="cpu").normal_(
                0.0, std, generator=generator
            )
            made["router.weight"].copy_(drawn)
        weights |= {f"model.layers.{index}.mlp.{name}": value for name, value in made.items()}
    # on "meta" nothing is allocated or drawn; the weights are then assigned
    with torch.device("meta"):
        result = DSMoEForCausalLM(config)
    result.load_state_dict(weights, strict=True, assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    return result.eval()


def _split_layer(experts: Any, num_experts: int, assignment: str, seed: int) -> dict[str, Tensor]:
    up_HD, down_FD = experts.input_proj[0].detach(), experts.down_proj[0].detach()
    gated = experts.mlp_type == "swiglu"
    parts = up_HD.chunk(2) if gated else (up_HD,)
    units_NC = assign_units(parts[0], num_experts, assignment, seed)
    return {
        f"experts.{experts.stacked[0]}": torch.cat([part[units_NC] for part in parts], dim=1),
        f"experts.{experts.stacked[1]}": down_FD[units_NC],
        "router.weight": down_FD.new_zeros(num_experts, down_FD.shape[-1]),
    }
