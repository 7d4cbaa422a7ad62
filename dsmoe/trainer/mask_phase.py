"""The mask phase: the end of training runs with a threshold, steered to a target share of active experts."""

import math
from dataclasses import dataclass

from dsmoe.config.run import MaskPhaseSettings


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

    def policy(self, num_experts: int) -> dict:
        """The routing policy at the present threshold."""
        return {"policy": "threshold", "threshold": min(self.threshold, float(num_experts))}

    def update(self, active_share: float) -> None:
        """Move the threshold after a step with this mean active share over layers."""
        error = (active_share - self.settings.target_active) / self.settings.target_active
        self.threshold *= math.exp(self.settings.gain * max(-1.0, min(1.0, error)))
        self.steps += 1
