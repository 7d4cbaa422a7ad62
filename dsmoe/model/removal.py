"""Removing experts from a live model: their weights go, the router stays as it is."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from dsmoe.config.kept import kept_per_layer
from dsmoe.config.routing import policies_per_layer
from dsmoe.errors import UserError
from dsmoe.model.experts import Experts
from dsmoe.model.int8 import Int8Experts
from dsmoe.model.moa import MixtureOfHeads


@torch.no_grad()
def remove_experts(model: PreTrainedModel, part: str, kept: Sequence[Sequence[int] | None]) -> None:
    """Drop the weights of all experts but some, in place; the config then says which are kept.

    No token keeps a removed expert any more; gates of the others don't change (see `dsmoe.config.routing`). The
    stacked weights become new Parameters, so make an optimiser afterwards.

    Args:
        model: a dsmoe model; some experts may have been removed before.
        part: "mlp" or "attention".
        kept: per layer the ascending indices, among the original N, of the experts that stay; None: all that the
            layer still stores.

    Raises:
        UserError: an expert that isn't there, a layer without any, a policy whose k is above the number that remain,
            or experts in int8; nothing is changed then.
    """
    config = model.config
    if part not in ("mlp", "attention"):
        raise UserError(f"part is {part!r}; it must be mlp or attention")
    layers, num_experts, field = config.num_hidden_layers, config.num_experts_of(part), f"{part}_kept_experts"
    everything = list(range(num_experts))
    present = [config.kept_experts(part, layer) or everything for layer in range(layers)]
    if len(kept) == layers:
        kept = [before if entry is None else list(entry) for before, entry in zip(present, kept)]
    wanted = kept_per_layer(kept, layers, num_experts, field) or [everything] * layers
    for layer, (before, entry) in enumerate(zip(present, wanted)):
        gone = sorted(set(entry) - set(before))
        if gone:
            raise UserError(f"{field}[{layer}]: expert {gone[0]} was removed before; present are {before}")
    policies_per_layer(getattr(config, f"{part}_routing"), layers, num_experts, f"{part}_routing", wanted)
    if part == "mlp" and any(isinstance(module, Int8Experts) for module in model.modules()):
        raise UserError("the experts are in int8; remove experts first, then call quantize_int8")
    for module in model.modules():
        if isinstance(module, Experts if part == "mlp" else MixtureOfHeads):
            before, entry = present[module.layer_idx], wanted[module.layer_idx]
            if entry != before:
                _keep_rows(module, [before.index(expert) for expert in entry])
    setattr(config, field, kept_per_layer(wanted, layers, num_experts, field))


def _keep_rows(module: Experts | MixtureOfHeads, rows: Sequence[int]) -> None:
    for name in module.stacked:
        whole = getattr(module, name)
        setattr(module, name, nn.Parameter(whole[rows], requires_grad=whole.requires_grad))
