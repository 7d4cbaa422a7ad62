"""The guard against broken steps: a loss or gradient that is not finite, or far above the usual, moves no weight."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from dsmoe.config.run import GuardSettings


@dataclass
class RunningScale:
    """Exponential average and spread of a series.

    Attributes:
        count: values so far.
        mean: their average.
        variance: their spread around it.
    """

    count: int = 0
    mean: float = 0.0
    variance: float = 0.0

    def add(self, value: float, window: int) -> None:
        """Add a value; `window` is about how many values are remembered."""
        self.count += 1
        weight = 1 / min(self.count, window)
        off = value - self.mean
        self.mean += weight * off
        self.variance = (1 - weight) * (self.variance + weight * off * off)

    def limit(self, num_stds: float) -> float:
        """What lies `num_stds` standard deviations above the average."""
        return self.mean + num_stds * math.sqrt(self.variance)


@dataclass
class Guard:
    """Decides about each step and counts the skipped ones.

    Attributes:
        settings: of the run.
        total: steps skipped so far.
        consecutive: of them, those since the last good step.
        usual: scale of the loss and of the gradient's norm over good steps; those of the mask phase, whose loss is of
            another model, have scales of their own ("masked loss", "masked gradient norm").
    """

    settings: GuardSettings
    total: int = 0
    consecutive: int = 0
    usual: dict[str, RunningScale] = field(default_factory=dict)

    def judge(self, loss: float, grad_norm: float, masked: bool = False) -> str | None:
        """Judge a step before its update; every process must call it with the same numbers.

        Args:
            loss: language-modelling loss of the global batch, nats per token.
            grad_norm: norm of its gradient before clipping.
            masked: whether it is a step of the mask phase.

        Returns:
            Why the step is to be skipped; None: it is good.
        """
        kind = "masked " if masked else ""
        values = {f"{kind}loss": loss, f"{kind}gradient norm": grad_norm}
        reason = self._not_finite(values) or self._spike(values)
        if reason and self.settings.enabled:
            self.total += 1
            self.consecutive += 1
            return reason
        self.consecutive = 0
        for name, value in values.items():
            if math.isfinite(value):
                self.usual.setdefault(name, RunningScale()).add(value, self.settings.spike_window)
        return None

    def exhausted(self) -> str | None:
        """Why training must stop after the skips so far; None: it goes on."""
        for name, count in (("consecutive", self.consecutive), ("total", self.total)):
            allowed = getattr(self.settings, f"max_{name}")
            if count >= allowed > 0:
                return f"{count} steps were skipped in {'a row' if name == 'consecutive' else 'total'} (guard.max_{name})"
        return None

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "settings"}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of `state`."""
        self.total, self.consecutive = state["total"], state["consecutive"]
        self.usual = {name: RunningScale(**scale) for name, scale in state["usual"].items()}

    @staticmethod
    def _not_finite(values: dict[str, float]) -> str | None:
        return next(
            (f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None
        )

    def _spike(self, values: dict[str, float]) -> str | None:
        num_stds, window = self.settings.spike_stds, self.settings.spike_window
        for name, value in values.items():
            usual = self.usual.get(name, RunningScale())
            if num_stds and usual.count >= window and value > usual.limit(num_stds):
                return f"{name} {value:.6g} is a spike: above {usual.limit(num_stds):.6g}, {num_stds:g} std over the mean"
        return None
