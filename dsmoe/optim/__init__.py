"""The optimiser and its schedules."""

from dsmoe.optim.adamw import build_optimizer
from dsmoe.optim.schedules import learning_rate_factor, loss_coefficient_factor

__all__ = ["build_optimizer", "learning_rate_factor", "loss_coefficient_factor"]
