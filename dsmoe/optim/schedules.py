"""Schedules as pure functions of the step, so that a resumed run needs no state for them."""

import math

from dsmoe.config.run import OptimSettings, RouterLossSettings


def learning_rate_factor(step: int, total_steps: int, settings: OptimSettings) -> float:
    """The learning rate of a step as a share of the peak.

    Args:
        step: from 0.
        total_steps: steps of the whole run.
        settings: warm-up, shape ("cosine" or "wsd") and final share.

    Returns:
        A number in (0, 1]. "wsd" (warm-up, stable, decay) falls linearly over its last `decay_fraction`.
    """
    warmup = max(1, round(settings.warmup_fraction * total_steps))
    if step < warmup:
        return (step + 1) / warmup
    low = settings.min_lr_ratio
    if settings.schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = max(1, round(settings.decay_fraction * total_steps))
    remaining = max(0, total_steps - step)
    return low + (1 - low) * min(1.0, remaining / decay)


def loss_coefficient_factor(step: int, total_steps: int, settings: RouterLossSettings) -> float:
    """The share of the mutual-information coefficient at a step.

    "constant" is 1; between the fractions `mi_ramp_start` and `mi_ramp_end` of the run "ramp" rises linearly from 0 to 1
    and "decay" falls linearly from 1 to `mi_final_factor`.
    """
    if settings.mi_schedule == "constant":
        return 1.0
    start, end = settings.mi_ramp_start * total_steps, settings.mi_ramp_end * total_steps
    progress = min(1.0, max(0.0, (step - start) / max(1.0, end - start)))
    if settings.mi_schedule == "decay":
        return 1.0 - progress * (1.0 - settings.mi_final_factor)
    return progress
