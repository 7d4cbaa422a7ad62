"""How the difference between two groups moves with tokens or with size: a line over the logarithm, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsmoe.spread import quantile

# what a curve can run along, and where a run's row says it
AXES = {"tokens": "tokens", "parameters": "num_params_total"}
# multiples of the largest measured value at which the line's prediction is reported
AHEAD = (1, 3, 10)


@dataclass(frozen=True)
class Curve:
    """A pair of groups to follow.

    Args:
        pair: (first, second) groups.
        against: a key of `AXES`.
        points: labels of the points that belong to the curve; the groups may have others.
    """

    pair: tuple[str, str]
    against: str
    points: tuple[str, ...]


def follow(
    curve: Curve, rows: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The measured differences along a curve, and the line through them.

    Args:
        curve: what to follow.
        rows: of `dsmoe.study.tabulate.collect`.
        pairs: the paired differences of the curve's two groups, from the same place; those on the test split are taken.

    Returns:
        {"first", "second", "against", "points": [{"label", "at", "differences", "seeds"}], "line": see `fit_line`}.
    """
    first, second = curve.pair
    place = {"-".join((row["group"], *row["labels"].values())): row for row in rows}
    points = []
    for pair in pairs:
        row = place[pair["first"]]
        label = next((label for label in row["labels"].values() if label in curve.points), None)
        if label is not None and "test" in pair:
            at = row[AXES[curve.against]]
            points.append(
                {"label": label, "at": at, "seeds": pair["seeds"], "differences": pair["test"]["differences"]}
            )
    points.sort(key=lambda point: point["at"])
    measured = [(point["at"], value) for point in points for value in point["differences"]]
    return {
        "first": first, "second": second, "against": curve.against, "points": points,
        "line": fit_line([at for at, _ in measured], [value for _, value in measured]),
    }  # fmt: skip


def fit_line(at: Sequence[float], differences: Sequence[float]) -> dict[str, Any] | None:
    """Least squares of the places' mean differences over log10 of tokens or parameters.

    What scatters around the line is a place's mean: the seeds of one place say nothing of whether a line is right.

    Args:
        at: positive, one a difference; those of one place are equal.
        differences: nats per token.

    Returns:
        None for fewer than two places. Otherwise {"slope" (nats per tenfold), "slope_interval", "num_places",
        "num_differences", "residual_std", "range" of the places, "ahead": [{"at", "difference", "interval"}] for
        multiples of the largest place}; intervals are of 95% by Student's t with places - 2 degrees of freedom, None for
        two places: that of the slope for the line, those ahead for the mean of a new place.
    """
    places: dict[float, list[float]] = {}
    for place, difference in zip(at, differences, strict=True):
        places.setdefault(place, []).append(difference)
    if len(places) < 2:
        return None
    x = np.log10(np.asarray(list(places), dtype=float))
    y = np.asarray([np.mean(found) for found in places.values()])
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    degrees = len(y) - 2
    residual_std = factor = None
    if degrees:
        residual_std = math.sqrt(float(((y - y.mean() - slope * (x - x.mean())) ** 2).sum()) / degrees)
        factor = quantile(degrees) * residual_std

    def interval(value: float, width: float) -> list[float] | None:
        return None if factor is None else [value - factor * width, value + factor * width]

    ahead = []
    for multiple in AHEAD:
        distance = math.log10(multiple * max(at)) - float(x.mean())
        value = float(y.mean()) + slope * distance
        width = math.sqrt(1 + 1 / len(y) + distance**2 / spread)
        ahead.append({"at": multiple * max(at), "difference": value, "interval": interval(value, width)})
    return {
        "slope": slope, "slope_interval": interval(slope, 1 / math.sqrt(spread)), "num_places": len(places),
        "num_differences": len(at), "residual_std": residual_std, "range": [min(at), max(at)], "ahead": ahead,
    }  # fmt: skip


def sentence(curve: Mapping[str, Any]) -> str:
    """The line in words."""
    line = curve["line"]
    name = f"{curve['first']} - {curve['second']} against {curve['against']}"
    if line is None:
        return f"{name}: too few places for a line."
    measured = (
        f"{line['num_differences']} differences at {line['num_places']} places from {line['range'][0] / 1e6:.3g}M to "
        f"{line['range'][1] / 1e6:.3g}M"
    )
    if line["slope_interval"] is None:
        return f"{name}: {line['slope']:+.4f} nats per tenfold, {measured}: too few for an interval."
    low, high = line["slope_interval"]
    verdict = "it can't be told from none" if low <= 0 <= high else "it grows" if low > 0 else "it falls"
    words = "; ".join(
        "at {:.3g}M {:+.3f} [{:+.3f}, {:+.3f}]".format(
            point["at"] / 1e6, point["difference"], *point["interval"]
        )
        for point in line["ahead"]
    )
    return (
        f"{name}: {line['slope']:+.4f} nats per tenfold, 95% interval [{low:+.4f}, {high:+.4f}] ({verdict}), {measured}. "
        f"The mean of a new place would be, with 95%, if the line is right: {words}."
    )
