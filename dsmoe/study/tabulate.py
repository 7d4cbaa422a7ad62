"""A study's results: every run, means over seeds, paired differences between groups."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.accounting import markdown_table
from dsmoe.files import read_json
from dsmoe.study.curves import follow, sentence
from dsmoe.study.kept import Kept, digest
from dsmoe.study.spec import Study, StudyRun
from dsmoe.trainer.seeds import spread

COPIED = ("kind", "tokens", "validation_loss", "validation_loss_sparse", "test_loss", "test_loss_sparse",
          "active_experts_sparse", "mlp_active_fraction", "num_params_total", "num_params_active", "training_flops",
          "training_seconds")  # fmt: skip


def final_loss(row: Mapping[str, Any], split: str = "validation") -> float:
    """The loss in the mode that a model is run in: sparse for a DS-MoE, its own for the others."""
    sparse = row.get(f"{split}_loss_sparse")
    return row[f"{split}_loss"] if sparse is None else sparse


def collect(study: Study, output: Path, kept: Kept | None = None) -> dict[str, Any]:
    """Everything that the finished runs gave.

    Args:
        study: the study.
        output: the folder of its runs.
        kept: runs of its record; they stand in for those that have no folder.

    Returns:
        {"name", "runs": [one dict per finished run], "missing": names, "groups": [mean and spread over seeds of each
        point], "pairs": [paired differences first - second at each point that both groups have], "curves": of
        `dsmoe.study.curves.follow`}.
    """
    kept = kept or Kept()
    rows, missing, environment = [], [], kept.environment
    for run in study.runs:
        path = output / run.name / "summary.json"
        if path.exists():
            summary = read_json(path)
            environment = summary["environment"]
            rows.append({**_row(run, summary), "digest": digest(study, run)})
        elif run.name in kept.rows:
            rows.append(kept.rows[run.name])
        else:
            missing.append(run.name)
    return {
        "name": study.name,
        "runs": rows,
        "missing": missing,
        "groups": _groups(rows),
        "pairs": [pair for names in study.pairs for pair in _pair(rows, *names)],
        "curves": [follow(curve, rows, _pair(rows, *curve.pair)) for curve in study.curves],
        "environment": environment,
    }


def _row(run: StudyRun, summary: Mapping[str, Any]) -> dict[str, Any]:
    found = {"name": run.name, "group": run.group, "labels": run.labels, "seed": run.seed}
    found |= {key: summary[key] for key in COPIED if key in summary}
    return {
        **found,
        "model": summary["config"]["model"],
        "settings": run.settings,
        "corpus": summary["environment"].get("corpus"),
    }


def _point(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["group"], *row["labels"].values())


def point_name(row: Mapping[str, Any]) -> str:
    """What the rows of all seeds have in common, as `StudyRun.point` writes it."""
    return "-".join(_point(row))


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    points = defaultdict(list)
    for row in rows:
        points[_point(row)].append(row)
    return points


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for same in _points(rows).values():
        point = {
            "group": same[0]["group"],
            "labels": same[0]["labels"],
            "seeds": [row["seed"] for row in same],
        }
        for split in ("validation", "test"):
            if all(f"{split}_loss" in row for row in same):
                point[f"{split}_loss"] = spread([final_loss(row, split) for row in same])
        found.append(point)
    return found


def _pair(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> list[dict[str, Any]]:
    points = _points(rows)
    by_name = {"-".join(point): point for point in points}
    if first in by_name and second in by_name:
        matches = [(by_name[first], by_name[second])]
    else:
        matches = [(point, (second, *point[1:])) for point in points if point[0] == first]
    found = []
    for ours, theirs in matches:
        of_seed = {row["seed"]: row for row in points.get(theirs, [])}
        common = [(row, of_seed[row["seed"]]) for row in points[ours] if row["seed"] in of_seed]
        if common:
            seeds = [row["seed"] for row, _ in common]
            pair: dict[str, Any] = {"first": "-".join(ours), "second": "-".join(theirs), "seeds": seeds}
            for split in ("validation", "test"):
                if all(f"{split}_loss" in row for both in common for row in both):
                    differences = [final_loss(row, split) - final_loss(other, split) for row, other in common]
                    pair[split] = {"differences": differences, **spread(differences)}
            found.append(pair)
    return found


def table(results: Mapping[str, Any]) -> str:
    """The study as Markdown: one row a point, then the paired differences."""
    rows = []
    by_point = _points(results["runs"])
    for point in results["groups"]:
        same = by_point[_point(point)]
        first = same[0]
        rows.append(
            [
                point_name(point),
                str(len(same)),
                f"{first['tokens'] / 1e6:.2f}M",
                f"{first['num_params_total'] / 1e6:.2f}M",
                f"{first['num_params_active'] / 1e6:.2f}M",
                f"{first['training_flops']:.2e}",
                _mean(point.get("validation_loss")),
                _mean(point.get("test_loss")),
            ]
        )
    header = ["runs", "seeds", "tokens", "total", "active", "FLOPs", "validation loss", "test loss"]
    text = markdown_table(header, rows)
    if results["pairs"]:
        pairs = [
            [f"{pair['first']} - {pair['second']}", str(len(pair["seeds"])),
             _mean(pair.get("validation"), sign=True), _mean(pair.get("test"), sign=True)]
            for pair in results["pairs"]
        ]  # fmt: skip
        text += "\n\n" + markdown_table(["difference", "seeds", "validation", "test"], pairs)
    if results["curves"]:
        text += "\n\n" + "\n".join(f"- {sentence(curve)}" for curve in results["curves"])
    return text


def _mean(value: Mapping[str, Any] | None, sign: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{value['mean']:+.4f}" if sign else f"{value['mean']:.4f}"
    return mean if value["stderr"] is None else f"{mean} ± {value['stderr']:.4f}"
