"""Closed-loop control of the coefficient of the MLP routers' mutual information (the paper's alpha)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmoe.config import DSMoEConfig
from dsmoe.config.run import RouterLossSettings
from dsmoe.losses import RouterStatistics, statistics_values
from dsmoe.trainer.mask_phase import steering_factor

_LIMITS = (1e-2, 1e2)


class MIController:
    """Multiplies the coefficient by exp(gain * relative error of the share of experts above the threshold).

    A larger coefficient makes each token's distribution sharper, so fewer experts stand above the threshold.

    Args:
        settings: start value, target, gain and threshold.
        num_layers: of the model.

    Attributes:
        factors: the present coefficients as multiples of the start value: one, or with `mi_control: layer` one a layer.
    """

    def __init__(self, settings: RouterLossSettings, num_layers: int) -> None:
        self.settings, self.num_layers = settings, num_layers
        self.factors = [1.0] * (num_layers if settings.mi_control == "layer" else 1)

    @property
    def coefs(self) -> list[float]:
        """The present coefficients, before the schedule: one, or one a layer."""
        return [self.settings.router_mi_loss_coef_mlp * factor for factor in self.factors]

    def layer_factors(self) -> Tensor:
        """[L] float64, for `router_losses`."""
        factors = self.factors if len(self.factors) > 1 else self.factors * self.num_layers
        return torch.tensor(factors, dtype=torch.float64)

    def update(self, statistics: RouterStatistics) -> None:
        """Move the coefficients after a good step with these statistics of the MLP routers over the global batch."""
        shares: Sequence[float] = statistics_values(statistics)["above_threshold"].tolist()
        if self.settings.mi_control == "model":
            shares = [sum(shares) / len(shares)]
        low, high = _LIMITS
        for index, share in enumerate(shares):
            step = steering_factor(share, self.settings.mi_target_active, self.settings.mi_control_gain)
            self.factors[index] = min(high, max(low, self.factors[index] * step))

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"factors": self.factors}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of `state`; that of another number of coefficients is left, and control starts anew."""
        factors = state.get("factors", [])
        if len(factors) == len(self.factors):
            self.factors = list(factors)


def make_mi_controller(settings: RouterLossSettings, config: DSMoEConfig) -> MIController | None:
    """What steers the coefficient; None: nothing does, or there are no MLP experts."""
    if settings.mi_control == "none" or config.num_experts == 1:
        return None
    return MIController(settings, config.num_hidden_layers)
