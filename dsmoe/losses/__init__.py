"""Router losses: pure functions of the router logits that the model returns."""

from dsmoe.losses.router import (
    RouterLosses,
    RouterStatistics,
    router_losses,
    router_statistics,
    statistics_values,
)

__all__ = ["RouterLosses", "RouterStatistics", "router_losses", "router_statistics", "statistics_values"]
