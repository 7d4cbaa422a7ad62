"""Sizes and costs that a run's summary reports, from the config and the measured share of active experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsmoe.accounting import (
    count_parameters,
    forward_flops_per_token,
    stored_experts,
    training_flops_per_token,
)
from dsmoe.config import DSMoEConfig
from dsmoe.config.run import RunConfig
from dsmoe.losses import RouterStatistics


@dataclass
class MaskedSteps:
    """What the steps of the mask phase computed.

    Attributes:
        steps: steps counted (those that the guard skipped are not, and so stand in the cost as if they had all experts).
        active: "mlp" and "attention": mean experts per layer, summed over the steps.
    """

    steps: int = 0
    active: dict[str, list[float]] = field(default_factory=dict)

    def add(self, config: DSMoEConfig, statistics: Mapping[str, RouterStatistics]) -> None:
        """Count a step that ran with the routing policies that the config holds now."""
        self.steps += 1
        for part, found in statistics.items():
            kept = (found.load_LN.sum(-1).double() / found.num_tokens.double()).tolist()
            stored = stored_experts(config, part)
            # with all experts the load is made of shares, not of experts
            step = [
                float(most)
                if config.routing(part, layer)["policy"] == "dense"
                else min(max(kept[layer], 1.0), most)
                for layer, most in enumerate(stored)
            ]
            before = self.active.get(part, [0.0] * len(step))
            self.active[part] = [old + new for old, new in zip(before, step)]

    def mean_active(self) -> dict[str, list[float]]:
        """Mean experts per layer over the steps, as `dsmoe.accounting` takes them; {} before the first."""
        return {part: [value / self.steps for value in sums] for part, sums in self.active.items()}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"steps": self.steps, "active": self.active}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state of `state`; {} of a checkpoint that knows none: its steps count as all experts."""
        self.steps, self.active = state.get("steps", 0), dict(state.get("active", {}))


def sizes_and_cost(
    config: RunConfig,
    model_config: DSMoEConfig,
    active_experts_sparse: Sequence[float] | None,
    masked: MaskedSteps,
) -> dict[str, Any]:
    """Parameters and training FLOPs.

    Args:
        config: of the run.
        model_config: of the model.
        active_experts_sparse: measured mean MLP experts per layer in sparse mode; None: what the config's policies say.
        masked: the steps of the mask phase.

    Returns:
        num_params_total, num_params_active and mlp_active_fraction (of sparse mode in a DS-MoE, embeddings included),
        training_flops (forward and backward of all steps; a DS-MoE pays for all experts before the mask phase and for
        the kept ones in it), masked_tokens (of the mask phase) and masked_active_experts (mean per layer in it, by part).
    """
    mean_active = {"mlp": list(active_experts_sparse)} if active_experts_sparse else None
    counts = count_parameters(model_config, mean_active)
    tokens = config.total_steps * config.tokens_per_step
    masked_tokens = masked.steps * config.tokens_per_step

    def per_token(**of_step: Any) -> float:
        return training_flops_per_token(
            model_config,
            config.data.sequence_length,
            gradient_checkpointing=config.train.gradient_checkpointing,
            causal=True,
            **of_step,
        )

    flops = per_token() * (tokens - masked_tokens)
    if masked_tokens:
        flops += per_token(mean_active=masked.mean_active(), masked=True) * masked_tokens
    return {
        "num_params_total": counts.total,
        "num_params_active": counts.active,
        "mlp_active_fraction": counts.mlp_active_fraction,
        "training_flops": flops + _teacher_flops(config, model_config) * tokens,
        "masked_tokens": masked_tokens,
        "masked_active_experts": masked.mean_active(),
    }


def _teacher_flops(config: RunConfig, model_config: Any) -> float:
    """FLOPs per token, on average over all steps, of the forward passes that distillation adds."""
    if not config.distillation.coef:
        return 0.0
    share = 1.0 if config.distillation.teacher else config.mask_phase.fraction
    context = (config.data.sequence_length + 1) / 2
    return share * forward_flops_per_token(model_config, context, all_experts=True).total
