"""Mean and spread of a few values, one a seed, and whether they tell zero from a difference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

LEVEL = 0.95


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, spread and interval of the mean.

    Args:
        values: one a seed, at least one.

    Returns:
        {"mean", "std" (of the sample), "stderr", "interval" (of 95% for the mean, by Student's t with n - 1 degrees of
        freedom: 12.7, 4.3 and 2.8 standard errors either way with 2, 3 and 5 values)}; all but the mean are None for a
        single value.
    """
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "std": None, "stderr": None, "interval": None}
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    stderr = std / math.sqrt(len(values))
    half = quantile(len(values) - 1) * stderr
    return {"mean": mean, "std": std, "stderr": stderr, "interval": [mean - half, mean + half]}


def quantile(degrees: int) -> float:
    """Standard errors either way of an interval of 95% by Student's t."""
    from scipy import stats  # half a second, and most commands need none

    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


def is_tie(difference: Mapping[str, Any]) -> bool | None:
    """Whether a difference can't be told from zero: its interval holds it. None for a single value, which tells nothing.

    Args:
        difference: what `spread` gave of paired differences.
    """
    interval = difference["interval"]
    return None if interval is None else interval[0] <= 0 <= interval[1]


def shown(value: Mapping[str, Any] | None, sign: bool = False) -> str:
    """Mean and standard error for a table; empty without a value."""
    if value is None:
        return ""
    mean = f"{value['mean']:+.4f}" if sign else f"{value['mean']:.4f}"
    return mean if value["stderr"] is None else f"{mean} ± {value['stderr']:.4f}"


def interval_cells(difference: Mapping[str, Any] | None) -> list[str]:
    """Two cells for a table: the interval of a difference, and "tie" where it holds zero."""
    if difference is None or difference["interval"] is None:
        return ["", ""]
    low, high = difference["interval"]
    return [f"{low:+.3f} to {high:+.3f}", "tie" if is_tie(difference) else ""]
