"""Changing the routing policy of a live model. The modules read it from the config at each forward."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import policies_per_layer
from dsmoe.errors import UserError

Policies = tuple[Any, Any]


def set_routing(
    model: PreTrainedModel, part: str, policy: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> None:
    """Set the routing policy of the "mlp" or "attention" experts, one for all layers or one per layer.

    Raises:
        UserError: the policy doesn't fit the model, or there is no such part.
    """
    if part not in ("mlp", "attention"):
        raise UserError(f"part is {part!r}; it must be mlp or attention")
    config = model.config
    name, kept = f"{part}_routing", getattr(config, f"{part}_kept_experts")
    policies = policies_per_layer(policy, config.num_hidden_layers, config.num_experts_of(part), name, kept)
    setattr(config, name, policies)


@contextmanager
def use_routing(
    model: PreTrainedModel,
    mlp: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    attention: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[None]:
    """Run the block with other routing policies (None: unchanged), then restore those that were."""
    config: Any = model.config
    with under_policies(config, policies_of(config)):
        if mlp is not None and config.num_experts > 1:
            set_routing(model, "mlp", mlp)
        if attention is not None and config.num_attention_experts > 1:
            set_routing(model, "attention", attention)
        yield


def policies_of(config: DSMoEConfig) -> Policies:
    """All policies that a config holds now; changing them later doesn't change what was returned."""
    return config.mlp_routing, config.attention_routing


@contextmanager
def under_policies(config: DSMoEConfig, policies: Policies) -> Iterator[None]:
    """Run the block with policies that `policies_of` returned, then restore those that were."""
    before = policies_of(config)
    try:
        config.mlp_routing, config.attention_routing = policies
        yield
    finally:
        config.mlp_routing, config.attention_routing = before
