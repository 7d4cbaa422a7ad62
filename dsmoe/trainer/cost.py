"""Sizes and costs that a run's summary reports, from the config and the measured share of active experts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsmoe.accounting import (
    count_parameters,
    forward_flops_per_token,
    stored_experts,
    training_flops_per_token,
    training_forward_flops_per_token,
)
from dsmoe.accounting.sizes import MeanActive
from dsmoe.config import DSMoEConfig
from dsmoe.config.run import RunConfig
from dsmoe.errors import UserError
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
            # where all layers keep all experts the load is made of shares, not of experts
            step = [
                float(most) if config.is_dense_layer(part, layer) else min(max(kept[layer], 1.0), most)
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
    mean_active: MeanActive,
    masked: MaskedSteps,
    *,
    gathers: bool = False,
    teacher: DSMoEConfig | None = None,
) -> dict[str, Any]:
    """Parameters and training FLOPs.

    Args:
        config: of the run.
        model_config: of the model.
        mean_active: measured mean experts per layer in the mode that the model is run in; parts that are left out
            follow the config's policies.
        masked: the steps of the mask phase.
        gathers: each step has one more forward pass, for the statistics of its micro-batches.
        teacher: of the frozen teacher; None: there is none.

    Returns:
        num_params_total, num_params_active and mlp_active_fraction (of sparse mode in a DS-MoE, embeddings included),
        training_flops (forward and backward of all steps; a DS-MoE pays for all experts before the mask phase and for
        the kept ones in it), masked_tokens (of the mask phase) and masked_active_experts (mean per layer in it, by part).
    """
    counts = count_parameters(model_config, mean_active)
    masked_tokens = masked.steps * config.tokens_per_step
    tokens = config.total_steps * config.tokens_per_step
    flops = _flops_per_token(config, model_config, mean_active, gathers) * (tokens - masked_tokens)
    if masked_tokens:
        flops += (
            _flops_per_token(config, model_config, masked.mean_active(), gathers, masked=True) * masked_tokens
        )
    if config.distillation.coef:
        # a model in all-experts mode is its own teacher's equal: nothing is computed then
        taught = tokens if teacher is not None or model_config.kind == "smoe" else masked_tokens
        context = (config.data.sequence_length + 1) / 2
        flops += _teacher_flops(teacher, model_config, context) * taught
    return {
        "num_params_total": counts.total,
        "num_params_active": counts.active,
        "mlp_active_fraction": counts.mlp_active_fraction,
        "training_flops": flops,
        "masked_tokens": masked_tokens,
        "masked_active_experts": masked.mean_active(),
    }


def _flops_per_token(
    config: RunConfig, model_config: DSMoEConfig, active: MeanActive, gathers: bool, masked: bool = False
) -> float:
    """Forward and backward of a token, in the mask phase or outside of it."""
    length = config.data.sequence_length
    flops = training_flops_per_token(
        model_config,
        length,
        active,
        gradient_checkpointing=config.train.gradient_checkpointing,
        causal=True,
        masked=masked,
        recompute_experts=config.train.recompute_experts,
    )
    if gathers:
        flops += training_forward_flops_per_token(model_config, length, active, True, masked).layers
    return flops


def _teacher_flops(teacher: DSMoEConfig | None, student: DSMoEConfig, context: float) -> float:
    """Forward pass of a token: of the model with all its experts, or of a frozen teacher by its own policies."""
    try:
        return forward_flops_per_token(teacher or student, context, all_experts=teacher is None).total
    except UserError:  # an SMoE of thresholds, whose experts depend on the text: at most all of them
        return forward_flops_per_token(teacher, context, all_experts=True).total
