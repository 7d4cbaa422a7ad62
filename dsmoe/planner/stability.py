"""Does the recommendation change? Every bootstrap draw of a fitted law plans anew."""

from collections.abc import Sequence

from dsmoe.planner.lawfile import PlanningLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.optimum import real_optimum
from dsmoe.planner.shapes import Family

MOST_DRAWS = 200  # keeps a plan under two seconds


def decision_shares(
    families: Sequence[Family], limits: Limits, law: PlanningLaw
) -> list[dict[str, float | None]]:
    """Share of the bootstrap draws in which each family is best, and best or tied.

    Each draw sizes every family anew by its own coefficients, to a shape that can be built, as the rows are: an optimum
    below the smallest one says nothing about the rows.

    Returns:
        One {"best_share", "best_or_tied_share"} per family; nulls for a law without draws.
    """
    draws = law.draws[:MOST_DRAWS]
    if not draws:
        return [{"best_share": None, "best_or_tied_share": None} for _ in families]
    best, tied = [0] * len(families), [0] * len(families)
    for draw in draws:
        shapes = [real_optimum(family, draw.sized_loss(family), limits) for family in families]
        losses = [float("inf") if shape is None else shape.loss for shape in shapes]
        least = min(losses)
        best[losses.index(least)] += 1
        for index, loss in enumerate(losses):
            tied[index] += loss - least <= law.tie_band
    return [
        {"best_share": one / len(draws), "best_or_tied_share": other / len(draws)}
        for one, other in zip(best, tied)
    ]
