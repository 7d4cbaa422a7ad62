"""How the difference between two groups moves with tokens or with size: a line over the logarithm, with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

# what a curve can run along, and where a run's row says it
AXES = {"tokens": "tokens", "parameters": "num_params_total"}
# multiples of the largest measured value at which the line's prediction is reported
AHEAD = (1, 3, 10)
LEVEL = 0.95


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
    """Least squares of a difference over log10 of tokens or parameters; every seed of every point counts once.

    Args:
        at: positive, one a difference.
        differences: nats per token.

    Returns:
        None for fewer than three differences or fewer than two places. Otherwise {"slope" (nats per tenfold),
        "slope_interval", "num_differences", "residual_std", "range" of the places, "ahead": [{"at", "difference",
        "interval"}] for multiples of the largest place}; intervals are of 95% by Student's t with n - 2 degrees of
        freedom: that of the slope for the line, those ahead for a single new run.
    """
    if len(differences) < 3 or len(set(at)) < 2:
        return None
    x, y = np.log10(np.asarray(at, dtype=float)), np.asarray(differences, dtype=float)
    spread = float(((x - x.mean()) ** 2).sum())
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    residual_std = math.sqrt(float(((y - y.mean() - slope * (x - x.mean())) ** 2).sum()) / (len(y) - 2))
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(y) - 2))
    half = quantile * residual_std / math.sqrt(spread)
    ahead = []
    for factor in AHEAD:
        distance = math.log10(factor * max(at)) - float(x.mean())
        width = quantile * residual_std * math.sqrt(1 + 1 / len(y) + distance**2 / spread)
        value = float(y.mean()) + slope * distance
        ahead.append(
            {"at": factor * max(at), "difference": value, "interval": [value - width, value + width]}
        )
    return {
        "slope": slope, "slope_interval": [slope - half, slope + half], "num_differences": len(y),
        "residual_std": residual_std, "range": [min(at), max(at)], "ahead": ahead,
    }  # fmt: skip


def sentence(curve: Mapping[str, Any]) -> str:
    """The line in words."""
    line = curve["line"]
    name = f"{curve['first']} - {curve['second']} against {curve['against']}"
    if line is None:
        return f"{name}: too few differences for a line."
    low, high = line["slope_interval"]
    verdict = "it can't be told from none" if low < 0 < high else "it grows" if low > 0 else "it falls"
    words = "; ".join(
        "at {:.3g}M {:+.3f} [{:+.3f}, {:+.3f}]".format(
            point["at"] / 1e6, point["difference"], *point["interval"]
        )
        for point in line["ahead"]
    )
    return (
        f"{name}: {line['slope']:+.4f} nats per tenfold, 95% interval [{low:+.4f}, {high:+.4f}] ({verdict}), "
        f"{line['num_differences']} differences from {line['range'][0] / 1e6:.3g}M to {line['range'][1] / 1e6:.3g}M. "
        f"A new run would be, with 95%: {words}."
    )
