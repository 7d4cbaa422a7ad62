"""Several seeds of one configuration: mean and spread, and a paired comparison with another run of the same seeds."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.data.windows import PLACEMENT
from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.spread import is_tie, spread
from dsmoe.trainer.differences import changed, with_defaults
from dsmoe.trainer.outcome import final_loss, measured_by, unlike


def summarise(summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spread of every loss over seeds."""
    names = [f"{split}_loss{mode}" for split in ("validation", "test") for mode in ("", "_sparse")]
    names = [name for name in names if all(name in summary for summary in summaries)]
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
        changes = changed(with_defaults(first["config"]), with_defaults(summary["config"]))
        if changes:
            raise UserError(
                f"{path}: of another configuration than the other seeds in {run_dir} ({changes[0]})"
            )
        found[seed] = summary
    return found


def check_comparable(
    seeds: Sequence[int],
    corpus: str | None,
    measured: Mapping[str, Any],
    second: Path,
    windows: str | None = PLACEMENT,
) -> dict[int, dict[str, Any]]:
    """The finished runs of a folder that runs of these seeds, of this text and measured so can be compared with.

    Args:
        seeds: of the first runs.
        corpus: fingerprint of their text.
        measured: `measured_by` of their configuration.
        second: the other run's folder.
        windows: where the first runs' evaluation windows lie.

    Returns:
        Its summaries of these seeds, by seed.

    Raises:
        UserError: no finished run there, no seed in common, losses of another text or of another part of it, or runs of
            several configurations.
    """
    found = seed_summaries(second)
    if not found:
        raise UserError(f"{second}: no finished run there (no summary.json)")
    common = {seed: found[seed] for seed in sorted(found) if seed in seeds}
    if not common:
        raise UserError(
            f"{second}: has no finished run of seed {', '.join(map(str, sorted(seeds)))}, but of "
            f"{', '.join(map(str, sorted(found)))}; train one of these"
        )
    for seed, summary in common.items():
        reason = unlike(
            (corpus, summary["environment"].get("corpus")),
            (windows, summary.get("evaluation_windows")),
            (measured, measured_by(with_defaults(summary["config"]))),
        )
        if reason is not None:
            raise UserError(f"{second}: seed {seed} can't be compared with, since {reason}; train it anew")
    return common


def compare(summaries: Sequence[dict[str, Any]], second: Path) -> dict[str, Any]:
    """Paired differences, of some runs less those of another run folder, over the seeds that both have.

    Args:
        summaries: of the first runs, of one configuration.
        second: the other run's folder.

    Returns:
        {"seeds", "differences" (of validation losses in the mode that each model is run in: sparse for a DS-MoE, nats
        per token), what `spread` gives of them, "tie", "test": the same of the test split where both have it,
        "tokens": [first, second] where they differ}.

    Raises:
        UserError: as `check_comparable`.
    """
    ours = {summary["seed"]: summary for summary in summaries}
    first = summaries[0]
    theirs = check_comparable(
        list(ours), first["environment"].get("corpus"), measured_by(with_defaults(first["config"])), second,
        first.get("evaluation_windows"),
    )  # fmt: skip
    pairs = [(ours[seed], theirs[seed]) for seed in theirs]
    result: dict[str, Any] = {"seeds": list(theirs), **_differences(pairs, "validation")}
    if all("test_loss" in summary for pair in pairs for summary in pair):
        result["test"] = _differences(pairs, "test")
    tokens = [first["tokens"], pairs[0][1]["tokens"]]
    if tokens[0] != tokens[1]:
        result["tokens"] = tokens
    return result


def _differences(pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], split: str) -> dict[str, Any]:
    found = [final_loss(our, split) - final_loss(their, split) for our, their in pairs]
    result = spread(found)
    return {"differences": found, **result, "tie": is_tie(result)}
