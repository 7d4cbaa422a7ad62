"""What single numbers of a run's configuration may be."""

import math
from collections.abc import Callable
from typing import Any

from dsmoe.errors import UserError

_Range = tuple[Callable[[float], bool], str]


def _at_least(low: float) -> _Range:
    return lambda value: low <= value < math.inf, f"at least {low}"


_ABOVE_0: _Range = lambda value: 0 < value < math.inf, "above 0"
_SHARE: _Range = lambda value: 0 <= value <= 1, "a share from 0 to 1"
_BELOW_1: _Range = lambda value: 0 <= value < 1, "from 0 to below 1"
RANGES: dict[str, _Range] = {
    "data.sequence_length": _at_least(2),
    "data.first_sample": _at_least(0),
    "optim.learning_rate": _at_least(0),
    "optim.warmup_fraction": _SHARE,
    "optim.decay_fraction": _SHARE,
    "optim.min_lr_ratio": _SHARE,
    "optim.weight_decay": _at_least(0),
    "optim.beta1": _BELOW_1,
    "optim.beta2": _BELOW_1,
    "optim.eps": _ABOVE_0,
    "optim.grad_clip": _at_least(0),
    "optim.router_lr_scale": _at_least(0),
    "router_loss.router_mi_loss_coef_mlp": _at_least(0),
    "router_loss.router_mi_loss_coef_attention": _at_least(0),
    "router_loss.load_balancing_coef": _at_least(0),
    "router_loss.router_z_loss_coef": _at_least(0),
    "router_loss.mi_ramp_start": _SHARE,
    "router_loss.mi_ramp_end": _SHARE,
    "router_loss.mi_running_decay": _BELOW_1,
    "router_loss.mi_final_factor": _at_least(0),
    "mask_phase.gain": _at_least(0),
    "guard.spike_stds": _at_least(0),
    "guard.spike_window": _at_least(2),
    "guard.max_consecutive": _at_least(0),
    "guard.max_total": _at_least(0),
    "train.total_tokens": _at_least(1),
    "train.global_batch_size": _at_least(1),
    "train.micro_batch_size": _at_least(1),
    "train.num_threads": _at_least(0),
    "train.eval_every_tokens": _at_least(0),
    "train.eval_tokens": _at_least(1),
    "train.log_every_steps": _at_least(1),
    "train.save_every_minutes": _ABOVE_0,
    "train.save_every_steps": _at_least(0),
    "train.keep_last": _at_least(1),
}


def check_ranges(config: Any) -> None:
    """Raise UserError on a number that can't work, or would silently do harm; NaN passes nowhere.

    Args:
        config: a RunConfig.
    """
    for name, (allowed, words) in RANGES.items():
        section, _, field = name.partition(".")
        value = getattr(getattr(config, section), field)
        if not allowed(value):
            raise UserError(f"{name} is {value}; it must be {words}")
