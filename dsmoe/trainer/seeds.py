"""Several seeds of one configuration: mean and spread, and a paired comparison with another run of the same seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.spread import is_tie, spread
from dsmoe.trainer.differences import HARMLESS, differences, with_defaults


def summarise(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spread of every validation loss over seeds."""
    names = [name for name in ("validation_loss", "validation_loss_sparse") if name in summaries[0]]
    return {
        "seeds": [summary["seed"] for summary in summaries],
        **{name: spread([summary[name] for summary in summaries]) for name in names},
    }


def seed_summaries(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Summaries of the finished runs under a run folder, by seed (the folder itself where there was a single one).

    Raises:
        UserError: a seed stands there twice, or runs of several configurations do.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in [run_dir, *sorted(run_dir.glob("seed-*"))]:
        if not (path / "summary.json").exists():
            continue
        summary = read_json(path / "summary.json")
        seed = int(summary["seed"])
        if seed in found:
            raise UserError(
                f"{path}: {run_dir} holds another run of seed {seed}; remove the one that is not meant"
            )
        first = next(iter(found.values()), summary)
        changes = differences(with_defaults(first["config"]), with_defaults(summary["config"]), HARMLESS)
        if changes:
            raise UserError(
                f"{path}: of another configuration than the other seeds in {run_dir} ({changes[0]})"
            )
        found[seed] = summary
    return found


def compare(
    summaries: Sequence[dict[str, Any]], second: Path, loss: str = "validation_loss"
) -> dict[str, Any]:
    """Paired differences of a loss, of some runs less those of another run folder, over the seeds that both have.

    Raises:
        UserError: no seed in common, losses of different parts of a split, or `second` holds runs of several
            configurations.
    """
    ours = {summary["seed"]: summary for summary in summaries}
    theirs = seed_summaries(second)
    common = sorted(set(ours) & set(theirs))
    if not common:
        raise UserError(f"{second} has no finished run of seed {', '.join(map(str, sorted(ours)))}")
    for seed in common:
        if ours[seed].get("evaluation_windows") != theirs[seed].get("evaluation_windows"):
            raise UserError(
                f"{second}: seed {seed} was measured by another version, on another part of the split; train both "
                "with one version"
            )
    found = [ours[seed][loss] - theirs[seed]["validation_loss"] for seed in common]
    result = spread(found)
    return {"seeds": common, "differences": found, **result, "tie": is_tie(result)}
