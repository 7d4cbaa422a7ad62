"""Several seeds of one configuration: mean and spread, and a paired comparison with another run of the same seeds."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.files import read_json


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation and standard error (None for a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return {"mean": mean, "std": None, "stderr": None}
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return {"mean": mean, "std": std, "stderr": std / math.sqrt(len(values))}


def summarise(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spread of every validation loss over seeds."""
    names = [name for name in ("validation_loss", "validation_loss_sparse") if name in summaries[0]]
    return {
        "seeds": [summary["seed"] for summary in summaries],
        **{name: spread([summary[name] for summary in summaries]) for name in names},
    }


def seed_folders(run_dir: Path) -> dict[int, Path]:
    """Finished runs under a run folder, by seed (the folder itself where there was a single one)."""
    found = {}
    for path in [run_dir, *sorted(run_dir.glob("seed-*"))]:
        if (path / "summary.json").exists():
            found[int(read_json(path / "summary.json")["seed"])] = path
    return found


def compare(first: Path, second: Path, loss: str = "validation_loss") -> dict[str, Any]:
    """Paired differences first - second of a loss over the seeds that both have finished.

    Raises:
        UserError: no seed in common.
    """
    ours, theirs = seed_folders(first), seed_folders(second)
    common = sorted(set(ours) & set(theirs))
    if not common:
        raise UserError(f"{first} and {second} have no finished seed in common")
    differences = []
    for seed in common:
        a, b = read_json(ours[seed] / "summary.json"), read_json(theirs[seed] / "summary.json")
        differences.append(a[loss] - b["validation_loss"])
    result = spread(differences)
    error = result["stderr"]
    mean = result["mean"]
    tie = None if error is None or mean is None else abs(mean) < 2 * error
    return {"seeds": common, "differences": differences, **result, "tie": tie}
