"""Does the recommendation change? Every bootstrap draw of a fitted law plans anew."""

from collections.abc import Sequence

from dsmoe.planner.lawfile import PlanningLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.optimum import optimise
from dsmoe.planner.shapes import Family

MOST_DRAWS = 200  # keeps a plan under two seconds


def decision_shares(
    families: Sequence[Family], limits: Limits, law: PlanningLaw
) -> list[dict[str, float | None]]:
    """Share of the bootstrap draws in which each family is best, and best or tied.

    Each draw sizes every family anew (over real hidden sizes) by its own coefficients.

    Returns:
        One {"best_share", "best_or_tied_share"} per family; nulls for a law without draws.
    """
    draws = law.draws[:MOST_DRAWS]
    if not draws:
        return [{"best_share": None, "best_or_tied_share": None} for _ in families]
    best, tied = [0] * len(families), [0] * len(families)
    for draw in draws:
        optima = [optimise(family, draw.sized_loss(family), limits) for family in families]
        losses = [float("inf") if optimum is None else optimum.loss for optimum in optima]
        least = min(losses)
        best[losses.index(least)] += 1
        for index, loss in enumerate(losses):
            tied[index] += loss - least <= law.tie_band
    return [
        {"best_share": one / len(draws), "best_or_tied_share": other / len(draws)}
        for one, other in zip(best, tied)
    ]
