"""A study's results: every run, means over seeds, paired differences between groups."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.accounting import markdown_table
from dsmoe.data.windows import PLACEMENT
from dsmoe.environment import machine_name
from dsmoe.files import read_json
from dsmoe.spread import interval_cells, shown, spread
from dsmoe.study.curves import follow, sentence
from dsmoe.study.kept import Kept, digest
from dsmoe.study.launcher import is_finished
from dsmoe.study.spec import Study, StudyRun
from dsmoe.trainer.differences import with_defaults
from dsmoe.trainer.outcome import final_loss, measured_by, unlike

COPIED = ("kind", "tokens", "validation_loss", "validation_loss_sparse", "test_loss", "test_loss_sparse",
          "active_experts_sparse", "mlp_active_fraction", "num_params_total", "num_params_active", "training_flops",
          "training_seconds", "evaluation_windows")  # fmt: skip
# the seeds of a point take the same steps, so a larger difference comes from how FLOPs were counted
SAME_FLOPS = 0.01
SPARSE = (
    "Losses of a DS-MoE are those of its sparse mode: at the threshold that its mask phase ended with, without such a "
    "phase at train.eval_policy. Active shares and parameters are measured on the validation split."
)

Row = Mapping[str, Any]


def collect(study: Study, output: Path, kept: Kept | None = None) -> dict[str, Any]:
    """Everything that the finished runs gave.

    Args:
        study: the study.
        output: the folder of its runs.
        kept: runs of its record; they stand in for those that have no folder.

    Returns:
        {"name", "runs": [one dict per finished run], "missing": names, "groups": [mean and spread over seeds of each
        point], "pairs": [paired differences first - second at each point that both groups have], "curves": of
        `dsmoe.study.curves.follow`, "environment", "notes": sentences on what was left out}.

    Raises:
        UserError: as `is_finished`: a folder holds a run of other settings.
    """
    kept = kept or Kept()
    rows, missing, environment = [], [], kept.environment
    for run in study.runs:
        if is_finished(study, run, output):
            summary = read_json(output / run.name / "summary.json")
            environment = summary["environment"]
            rows.append(_row(study, run, summary, output / run.name / "study.json"))
        elif run.name in kept.rows:
            rows.append(kept.rows[run.name])
        else:
            missing.append(run.name)
    compared = dict.fromkeys([*study.pairs, *(curve.pair for curve in study.curves)])
    return {
        "name": study.name,
        "runs": rows,
        "missing": missing,
        "groups": _groups(rows),
        "pairs": [pair for names in study.pairs for pair in _pair(rows, *names)],
        "curves": [follow(curve, rows, _pair(rows, *curve.pair)) for curve in study.curves],
        "environment": environment,
        "notes": [
            *(note for names in compared for note in _left_out(rows, *names)),
            *_older_windows(rows),
            *_of_others(rows),
            *machine_notes((row["name"], row) for row in rows),
        ],
    }


def _row(study: Study, run: StudyRun, summary: Row, begun: Path) -> dict[str, Any]:
    found = {"name": run.name, "group": run.group, "labels": run.labels, "seed": run.seed}
    found |= {key: summary[key] for key in COPIED if key in summary}
    found |= {"model": summary["config"]["model"], "corpus": summary["environment"].get("corpus")}
    found["measured_by"] = measured_by(with_defaults(summary["config"]))
    found["machine"] = machine_name(summary["environment"].get("hardware", {}))
    if not begun.exists():
        # nobody knows of what settings such a folder is, so its row claims none by a digest
        return {**found, "settings": run.settings}
    return {**found, "settings": read_json(begun)["settings"], "digest": digest(study, run)}


def _point(row: Row) -> tuple[str, ...]:
    return (row["group"], *row["labels"].values())


def point_name(row: Row) -> str:
    """What the rows of all seeds have in common, as `StudyRun.point` writes it."""
    return "-".join(_point(row))


def split_of(pairs: Sequence[Row]) -> str:
    """The split that differences are told of: test where it was measured."""
    return "test" if any("test" in pair for pair in pairs) else "validation"


def _points(rows: Sequence[Row]) -> dict[tuple[str, ...], list[Row]]:
    points = defaultdict(list)
    for row in rows:
        points[_point(row)].append(row)
    return points


def _groups(rows: Sequence[Row]) -> list[dict[str, Any]]:
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


def _matches(
    rows: Sequence[Row], first: str, second: str
) -> Iterator[tuple[str, str, list[tuple[Row, Row]]]]:
    """Names of the points that a pair of names compares, and the two rows of each seed that both have."""
    points = _points(rows)
    by_name = {"-".join(point): point for point in points}
    if first in by_name and second in by_name:
        matches = [(by_name[first], by_name[second])]
    else:
        matches = [(point, (second, *point[1:])) for point in points if point[0] == first]
    for ours, theirs in matches:
        of_seed = {row["seed"]: row for row in points.get(theirs, [])}
        common = [(row, of_seed[row["seed"]]) for row in points[ours] if row["seed"] in of_seed]
        yield "-".join(ours), "-".join(theirs), common


def _unlike(row: Row, other: Row) -> str | None:
    """Why the losses of two runs can't be compared; None where they can."""
    return unlike(
        (row.get("corpus"), other.get("corpus")),
        (row.get("evaluation_windows"), other.get("evaluation_windows")),
        (row.get("measured_by"), other.get("measured_by")),
    )


def _pair(rows: Sequence[Row], first: str, second: str) -> list[dict[str, Any]]:
    found = []
    for ours, theirs, matched in _matches(rows, first, second):
        common = [both for both in matched if _unlike(*both) is None]
        if common:
            pair: dict[str, Any] = {
                "first": ours,
                "second": theirs,
                "seeds": [row["seed"] for row, _ in common],
            }
            for split in ("validation", "test"):
                if all(f"{split}_loss" in row for both in common for row in both):
                    differences = [final_loss(row, split) - final_loss(other, split) for row, other in common]
                    pair[split] = {"differences": differences, **spread(differences)}
            found.append(pair)
    return found


def _left_out(rows: Sequence[Row], first: str, second: str) -> Iterator[str]:
    """A sentence for each two points of which `_pair` leaves seeds out."""
    for ours, theirs, matched in _matches(rows, first, second):
        reasons = defaultdict(list)
        for row, other in matched:
            reasons[_unlike(row, other)].append(str(row["seed"]))
        for reason, seeds in reasons.items():
            if reason is not None:
                yield f"{ours} - {theirs}: seed {', '.join(seeds)} left out, since {reason}."


def _older_windows(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence where only some of the runs were measured on windows spread over a split."""
    older = [row["name"] for row in rows if row.get("evaluation_windows") != PLACEMENT]
    if 0 < len(older) < len(rows):
        yield (
            f"Measured by an older version on the first tokens of each source, which is another text: {', '.join(older)}."
        )


def _of_others(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence on the rows that other studies trained."""
    named = [f"{row['name']} ({row['from']['study']})" for row in rows if "from" in row]
    if named:
        yield f"Runs of the same settings that another study trained: {', '.join(named)}."


def machine_notes(rows: Iterable[tuple[str, Row]]) -> list[str]:
    """A sentence on which runs are of which machine, where they are known to be of several.

    Args:
        rows: name and row of each run; rows of older versions don't say ("machine" is missing).
    """
    of_machine = defaultdict(list)
    for name, row in rows:
        of_machine[row.get("machine") or "an unrecorded machine"].append(name)
    if len(of_machine) < 2:
        return []
    most = max(of_machine, key=lambda machine: len(of_machine[machine]))
    others = [f"{machine}: {', '.join(names)}" for machine, names in of_machine.items() if machine != most]
    return [f"Trained on {most}, but for runs on {'; on '.join(others)}."]


def mean_flops(rows: Sequence[Row]) -> float:
    """Training FLOPs, on average over rows."""
    return sum(row["training_flops"] for row in rows) / len(rows)


def flops_notes(points: Iterable[tuple[str, Sequence[Row]]]) -> list[str]:
    """A sentence on the points whose seeds' FLOPs were not counted alike, if there are any.

    Args:
        points: name and rows of each.
    """
    names = []
    for name, same in points:
        flops = [row["training_flops"] for row in same]
        if max(flops) > (1 + SAME_FLOPS) * min(flops):
            names.append(name)
    if not names:
        return []
    return [
        f"FLOPs of {', '.join(names)} are means over seeds that differ by more than {SAME_FLOPS:.0%}; runs of older "
        "versions counted the mask phase at all experts."
    ]


def _millions(number: float) -> str:
    return f"{number / 1e6:.2f}M" if number >= 5e4 else f"{number / 1e3:.1f}k"


def _share(rows: Sequence[Row]) -> str:
    """The measured share of MLP experts, on average over rows; empty for rows of a version that didn't measure it."""
    shares = [row.get("mlp_active_fraction") for row in rows]
    known = [share for share in shares if share is not None]
    return f"{sum(known) / len(known):.0%}" if len(known) == len(rows) else ""


def table(results: Row) -> str:
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
                _millions(first["tokens"]),
                _millions(first["num_params_total"]),
                _share(same),
                _millions(sum(row["num_params_active"] for row in same) / len(same)),
                f"{mean_flops(same):.2e}",
                shown(point.get("validation_loss")),
                shown(point.get("test_loss")),
            ]
        )
    header = [
        "runs",
        "seeds",
        "tokens",
        "total",
        "MLP active",
        "active",
        "FLOPs",
        "validation loss",
        "test loss",
    ]
    text = markdown_table(header, rows)
    if results["pairs"]:
        split = split_of(results["pairs"])
        pairs = [
            [f"{pair['first']} - {pair['second']}", str(len(pair["seeds"])),
             shown(pair.get("validation"), sign=True), shown(pair.get("test"), sign=True),
             *interval_cells(pair.get(split))]
            for pair in results["pairs"]
        ]  # fmt: skip
        header = ["difference", "seeds", "validation", "test", f"95% interval, {split}", ""]
        text += "\n\n" + markdown_table(header, pairs)
    if results["curves"]:
        text += "\n\n" + "\n".join(f"- {sentence(curve)}" for curve in results["curves"])
    notes = [SPARSE] if any("validation_loss_sparse" in row for row in results["runs"]) else []
    notes += flops_notes((point_name(same[0]), same) for same in by_point.values()) + results["notes"]
    return text + "".join(f"\n\n{note}" for note in notes)
