"""Sizes and costs that a run's summary reports, from the config and the measured share of active experts."""

from collections.abc import Sequence
from typing import Any

from dsmoe.accounting import count_parameters, forward_flops_per_token, training_flops_per_token
from dsmoe.config.run import RunConfig


def sizes_and_cost(
    config: RunConfig, model_config: Any, active_experts_sparse: Sequence[float] | None
) -> dict[str, Any]:
    """Parameters and training FLOPs.

    Args:
        config: of the run.
        model_config: of the model.
        active_experts_sparse: measured mean MLP experts per layer in sparse mode; None: what the config's policies say.

    Returns:
        num_params_total, num_params_active and mlp_active_fraction (of sparse mode in a DS-MoE, embeddings included),
        training_flops (forward and backward of all steps; a DS-MoE pays for all experts).
    """
    mean_active = {"mlp": list(active_experts_sparse)} if active_experts_sparse else None
    counts = count_parameters(model_config, mean_active)
    tokens = config.total_steps * config.tokens_per_step
    per_token = training_flops_per_token(
        model_config,
        config.data.sequence_length,
        gradient_checkpointing=config.train.gradient_checkpointing,
        causal=True,
    )
    return {
        "num_params_total": counts.total,
        "num_params_active": counts.active,
        "mlp_active_fraction": counts.mlp_active_fraction,
        "training_flops": (per_token + _teacher_flops(config, model_config)) * tokens,
    }


def _teacher_flops(config: RunConfig, model_config: Any) -> float:
    """FLOPs per token, on average over all steps, of the forward passes that distillation adds."""
    if not config.distillation.coef:
        return 0.0
    share = 1.0 if config.distillation.teacher else config.mask_phase.fraction
    context = (config.data.sequence_length + 1) / 2
    return share * forward_flops_per_token(model_config, context, all_experts=True).total
