"""The mask phase: training with a sparse forward, by a threshold steered to a target share, or by fixed policies."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import Policy
from dsmoe.config.run import MaskPhaseSettings
from dsmoe.errors import UserError

Routing = dict[str, Any]  # keyword arguments of `use_routing`


@dataclass
class ThresholdController:
    """Closed loop: multiplies the threshold (on N * p) by exp(gain * relative error of the active share).

    Attributes:
        settings: fraction, target and gain.
        threshold: the present one; of a fresh run, one that keeps the better than uniform half.
        steps: steps of the phase so far.
    """

    settings: MaskPhaseSettings
    threshold: float = 0.5
    steps: int = 0

    def active_at(self, step: int, total_steps: int) -> bool:
        """Whether a step belongs to the phase."""
        return step >= total_steps * (1 - self.settings.fraction) and self.settings.fraction > 0

    def routing(self, step: int, num_experts: int) -> Routing:
        """The routing policies of a step of the phase."""
        return {"mlp": self.policy(num_experts)}

    def policy(self, num_experts: int) -> Policy | Sequence[Policy]:
        """The MLP policy that sparse validation runs with (one for all layers, or one per layer)."""
        return {"policy": "threshold", "threshold": min(self.threshold, float(num_experts))}

    def update(self, active_share: float) -> None:
        """Move the threshold after a step with this mean active share over layers."""
        error = (active_share - self.settings.target_active) / self.settings.target_active
        self.threshold *= math.exp(self.settings.gain * max(-1.0, min(1.0, error)))
        self.steps += 1


@dataclass
class PolicyCycle(ThresholdController):
    """Instead of a steered threshold: fixed policies, one drawn for each step; validation runs with the first.

    Attributes:
        routings: {"mlp": one policy per layer, "attention": the same}.
    """

    routings: list[Routing] = field(default_factory=list)

    def routing(self, step: int, num_experts: int) -> Routing:
        """Drawn by the step's number alone, so that a resumed run draws the same."""
        return random.Random(step).choice(self.routings)

    def policy(self, num_experts: int) -> Policy | Sequence[Policy]:
        """The MLP policies of the first checkpoint."""
        return self.routings[0]["mlp"]

    def update(self, active_share: float) -> None:
        """Nothing to steer."""
        self.steps += 1


def make_controller(settings: MaskPhaseSettings, config: DSMoEConfig) -> ThresholdController:
    """What decides the routing of the phase.

    Args:
        settings: of the phase.
        config: of the model.

    Raises:
        UserError: a folder of `policies` that is no checkpoint, or one whose experts are not the model's.
    """
    if not settings.policies:
        return ThresholdController(settings)
    if config.num_experts == 1:
        raise UserError(
            "mask_phase.policies: the model has no MLP experts, so the phase would change nothing"
        )
    routings = []
    for name in settings.policies:
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"mask_phase.policies: {name}: no config.json there; name folders of `dsmoe sparsify`"
            )
        other = DSMoEConfig.from_pretrained(folder)
        for field_name in ("num_hidden_layers", "num_experts", "num_attention_experts"):
            ours, theirs = getattr(config, field_name), getattr(other, field_name)
            if ours != theirs:
                raise UserError(
                    f"mask_phase.policies: {name}: {field_name} is {theirs}, the model has {ours}"
                )
        routings.append({"mlp": other.mlp_routing, "attention": other.attention_routing})
    return PolicyCycle(settings, routings=routings)
