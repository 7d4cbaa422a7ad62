"""The mask phase: training with a sparse forward, by thresholds steered to target shares, or by fixed policies."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsmoe.checkpoint.pretrained import read_config
from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import DENSE, Policy
from dsmoe.config.run import MaskPhaseSettings
from dsmoe.errors import UserError

# relative error of the active share from which on a run says that the threshold hasn't got there
MISSED = 0.1
Routing = dict[str, Any]  # keyword arguments of `use_routing`


def first_masked_step(fraction: float, total_steps: int) -> int:
    """The first step (from 0) of a mask phase of this share of the steps; `total_steps`: there is none."""
    # 1 - 0.7 is a little above 0.3, which must not cost the phase a step
    return math.ceil(total_steps * (1 - fraction) - 1e-9)


@dataclass
class ThresholdController:
    """Closed loop: multiplies the threshold (on N * p) by exp(gain * relative error of the active share).

    Attributes:
        settings: fraction, target, annealing and gain.
        total_steps: of the run, which annealing is measured by.
        threshold: the present one; of a fresh run, one that keeps the better than uniform half.
        steps: steps of the phase so far.
    """

    settings: MaskPhaseSettings
    total_steps: int
    threshold: float = 0.5
    steps: int = 0

    def active_at(self, step: int) -> bool:
        """Whether a step belongs to the phase."""
        return step >= first_masked_step(self.settings.fraction, self.total_steps)

    def start(self, measure: Callable[[Sequence[float]], Sequence[float]]) -> None:
        """Called before every step of the phase, with what gives the thresholds of given shares on its batch."""

    def routing(self, step: int, num_experts: int) -> Routing:
        """The routing policies of a step of the phase."""
        return {"mlp": self.policy(num_experts)}

    def policy(self, num_experts: int) -> Policy | Sequence[Policy]:
        """The MLP policy that sparse validation runs with (one for all layers, or one per layer)."""
        return threshold_policy(self.threshold, num_experts)

    def target_at(self, step: int) -> float:
        """The active share that a step of the phase is to have (`MaskPhaseSettings.anneal`)."""
        settings = self.settings
        if not settings.anneal:
            return settings.target_active
        first = first_masked_step(settings.fraction, self.total_steps)
        left = max(0.0, 1 - (step - first) / (settings.anneal * (self.total_steps - first)))
        return settings.target_active + (1 - settings.target_active) * left**3

    def update(self, active_share: float, step: int) -> None:
        """Move the threshold after a good step (of this number) with this mean active share over layers."""
        self.threshold *= steering_factor(active_share, self.target_at(step), self.settings.gain)
        self.steps += 1

    @property
    def wanted(self) -> float | None:
        """The active share that `policy` is steered to; None where nothing is."""
        return self.settings.target_active if self.steps else None

    def shown(self, step: int) -> dict[str, Any]:
        """What the log says after a step (of this number)."""
        annealed = {"target": self.target_at(step)} if self.settings.anneal else {}
        return {"threshold": self.threshold, **annealed}

    def summary(self) -> dict[str, Any]:
        """What the run's summary says."""
        return {"mask_phase_threshold": self.threshold if self.steps else None}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"threshold": self.threshold, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of `state`."""
        self.steps = state["steps"]
        # before the first sparse step it is what it begins with: a dense stage may be of a run with other targets
        if self.steps:
            self.threshold = state["threshold"]


def threshold_policy(threshold: float, num_experts: int) -> Policy:
    """The policy of a threshold, which above N would be none."""
    return {"policy": "threshold", "threshold": min(threshold, float(num_experts))}


def steering_factor(share: float, target: float, gain: float) -> float:
    """exp(gain * relative error of the share, clipped to -1..1)."""
    return math.exp(gain * max(-1.0, min(1.0, (share - target) / target)))


@dataclass
class BudgetController(ThresholdController):
    """Several target shares, one drawn for each step, each with a threshold and a closed loop of its own.

    A loop sees one step in as many as there are targets, so its gain is that much larger. The thresholds start from the
    quantiles of the first batch of the phase: one number can't be near all targets, and a loop that has few steps would
    spend them on the way. That takes a forward without gradients, once, on the batch that the first good step (a resumed
    one too) reads anyway. `threshold` is that of the target nearest to `target_active`.

    Attributes:
        thresholds: by target; 0 for the target 1, which is the all-experts mode and has nothing to steer.
    """

    thresholds: dict[float, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.targets = [float(target) for target in self.settings.targets]
        wanted = self.settings.target_active
        self.nearest = min(self.targets, key=lambda target: abs(target - wanted))
        self._set([self.threshold] * len(self.targets))

    def _set(self, thresholds: Sequence[float]) -> None:
        self.thresholds = {
            target: 0.0 if target == 1.0 else value for target, value in zip(self.targets, thresholds)
        }
        self.threshold = self.thresholds[self.nearest]

    def start(self, measure: Callable[[Sequence[float]], Sequence[float]]) -> None:
        """Start the thresholds where the batch of the first step has their shares."""
        if not self.steps:
            self._set(measure(self.targets))

    def target_at(self, step: int) -> float:
        """Drawn by the step's number alone, so that a resumed run draws the same."""
        return random.Random(step).choice(self.targets)

    def routing(self, step: int, num_experts: int) -> Routing:
        """The policy of the step's target."""
        return {"mlp": self._policy_of(self.target_at(step), num_experts)}

    def policy(self, num_experts: int) -> Policy | Sequence[Policy]:
        """The policy of the target nearest to `target_active`."""
        return self._policy_of(self.nearest, num_experts)

    @property
    def wanted(self) -> float | None:
        """The target nearest to `target_active`."""
        return self.nearest if self.steps else None

    def _policy_of(self, target: float, num_experts: int) -> Policy:
        return DENSE if target == 1.0 else threshold_policy(self.thresholds[target], num_experts)

    def update(self, active_share: float, step: int) -> None:
        """Move the threshold of the step's target."""
        target, gain = self.target_at(step), self.settings.gain * len(self.targets)
        self.thresholds[target] *= steering_factor(active_share, target, gain)
        self.threshold = self.thresholds[self.nearest]
        self.steps += 1

    def shown(self, step: int) -> dict[str, Any]:
        """All thresholds, and the step's target."""
        return {**super().shown(step), "thresholds": self._by_name(), "target": self.target_at(step)}

    def summary(self) -> dict[str, Any]:
        """All thresholds."""
        return {**super().summary(), "mask_phase_thresholds": self._by_name() if self.steps else None}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {**super().state(), "thresholds": self._by_name()}

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state of `state`; a target that it doesn't know starts from its one threshold."""
        super().load(state)
        known = state.get("thresholds", {})
        self._set([known.get(str(target), self.threshold) for target in self.targets])

    def _by_name(self) -> dict[str, float]:
        return {str(target): threshold for target, threshold in self.thresholds.items()}


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

    @property
    def wanted(self) -> float | None:
        """Nothing is steered."""
        return None

    def shown(self, step: int) -> dict[str, Any]:
        """No threshold."""
        return {}

    def summary(self) -> dict[str, Any]:
        """No threshold."""
        return {"mask_phase_threshold": None}

    def update(self, active_share: float, step: int) -> None:
        """Nothing to steer."""
        self.steps += 1


def missed_target(controller: ThresholdController, active_L: Sequence[float], num_experts: int) -> str | None:
    """What to tell of a phase whose threshold ended more than a tenth away from the wanted share; None: nothing.

    Args:
        controller: of the run, at its end.
        active_L: mean experts of each layer under its policy, as validation found them.
        num_experts: of the model.
    """
    share = sum(active_L) / len(active_L) / num_experts
    wanted = controller.wanted
    if wanted is None or abs(share - wanted) <= MISSED * wanted:
        return None
    return (
        f"warning: {share:.0%} of the experts are active at the end of the mask phase, and {wanted:.0%} were wanted: its "
        f"{controller.steps} steps didn't steer the threshold there; raise mask_phase.fraction or mask_phase.gain"
    )


def make_controller(
    settings: MaskPhaseSettings, config: DSMoEConfig, total_steps: int
) -> ThresholdController:
    """What decides the routing of the phase.

    Args:
        settings: of the phase.
        config: of the model.
        total_steps: of the run.

    Raises:
        UserError: a target below one expert, a folder of `policies` that is no model of this project, or one whose
            experts are not the model's.
    """
    if settings.targets:
        too_low = [target for target in settings.targets if target * config.num_experts < 1 - 1e-6]
        if too_low and config.num_experts > 1:
            raise UserError(
                f"mask_phase.targets: {too_low[0]} is below 1 / num_experts = {1 / config.num_experts:g}, and every "
                "token keeps at least one expert"
            )
        return BudgetController(settings, total_steps)
    if not settings.policies:
        if (
            settings.fraction
            and config.num_experts > 1
            and settings.target_active * config.num_experts < 1 - 1e-6
        ):
            raise UserError(
                f"mask_phase.target_active is {settings.target_active}, below 1 / num_experts = "
                f"{1 / config.num_experts:g}, and every token keeps at least one expert"
            )
        return ThresholdController(settings, total_steps)
    if config.num_experts == 1:
        raise UserError(
            "mask_phase.policies: the model has no MLP experts, so the phase would change nothing"
        )
    return PolicyCycle(
        settings, total_steps, routings=[_routing_of(name, config) for name in settings.policies]
    )


def _routing_of(name: str, config: DSMoEConfig) -> Routing:
    """The policies of a checkpoint in `mask_phase.policies`."""
    try:
        other = read_config(name)
    except UserError as error:
        raise UserError(f"mask_phase.policies: {error}; name folders of `dsmoe sparsify`") from None
    for field_name in ("num_hidden_layers", "num_experts", "num_attention_experts"):
        ours, theirs = getattr(config, field_name), getattr(other, field_name)
        if ours != theirs:
            raise UserError(f"mask_phase.policies: {name}: {field_name} is {theirs}, the model has {ours}")
    for part in ("mlp", "attention"):
        layers = range(config.num_hidden_layers)
        if any(config.kept_experts(part, layer) != other.kept_experts(part, layer) for layer in layers):
            # training would choose among all of them, and the result store all of them
            raise UserError(
                f"mask_phase.policies: {name}: experts were removed from it that the model has, and training would bring "
                "them back; run `dsmoe sparsify` without --remove-unused"
            )
    return {"mlp": other.mlp_routing, "attention": other.attention_routing}
