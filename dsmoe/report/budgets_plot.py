"""Plot of what the models of a study lose at each active share, beside the dense twin."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.report.budgets_pairs import SAME_SIZE, at_budget, best_arm, paired_difference, size_distance
from dsmoe.spread import spread

Row = Mapping[str, Any]
NAMES = {"dsmoe": "DS-MoE", "smoe": "SMoE"}


def budgets_plot(results: Mapping[str, Any], path: Path) -> None:
    """Draw `what_is_drawn` of a record's results: the active share of the MLP along, nats per token up."""
    found = what_is_drawn(results["runs"])
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.8, 5.2))
    for level in found["levels"]:
        axes.axhline(level["value"], color=KIND_COLOURS["dense"], linestyle="--", linewidth=1)
        place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8}
        axes.annotate(level["label"], (0.01, level["value"]), **place)
    # the one line of each kind is whole, those of single models are broken in turn
    broken = itertools.cycle([("--", "none"), (":", "left"), ("-.", "right")])
    for line in found["lines"]:
        style, filling = next(broken) if line["several"] else ("-", "full")
        axes.errorbar(
            [point["at"] for point in line["points"]], [point["value"] for point in line["points"]],
            yerr=[point["stderr"] or 0.0 for point in line["points"]], color=KIND_COLOURS[line["kind"]],
            marker="o" if line["kind"] == "dsmoe" else "^", label=line["label"], capsize=2, linestyle=style,
            fillstyle=filling,
        )  # fmt: skip
    for point in found["points"]:
        axes.plot(
            point["at"], point["value"], marker="x", color=KIND_COLOURS[point["kind"]], linestyle="none"
        )
        beside: dict[str, Any] = {"textcoords": "offset points", "xytext": (6, -3), "fontsize": 7}
        axes.annotate(point["label"], (point["at"], point["value"]), **beside)
    axes.set_xlabel("active share of the MLP")
    what = "test loss, less the dense twin's of the seed" if found["relative"] else "test loss"
    axes.set_ylabel(f"{what} (nats per token)")
    axes.grid(alpha=0.3)
    if found["lines"]:
        axes.legend(fontsize=8)
    save_figure(figure, path)


def what_is_drawn(rows: Sequence[Row]) -> dict[str, Any]:
    """The lines, levels and points of the plot.

    Args:
        rows: of `dsmoe.report.budgets.measured_rows`.

    Returns:
        {"relative": whether values are paired differences to the dense model of the size (they are where each sparse
        model has one; else they are losses), "lines": of each kind the models for one share that are best at theirs on
        validation, and every DS-MoE that was judged at several, each {"label", "kind", "several", "points": [{"at",
        "value", "stderr"}]}, "points": the other models for one share, likewise with "label" and "kind", "levels":
        [{"label", "value"}] of the dense models}.
    """
    arms: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        # a DS-MoE with all experts would be a point of its own, far to the right
        if row["kind"] == "smoe" or (row["kind"] == "dsmoe" and row["budget"] < 1):
            arms[row["arm"]].append(row)
    relative = all(_twin(rows, own) for own in arms.values())
    if not arms:
        return {"relative": False, "lines": [], "points": [], "levels": _levels(rows, None)}
    usual = Counter(own[0]["tokens"] for own in arms.values()).most_common(1)[0][0]
    lines: list[dict[str, Any]] = []
    points: list[dict[str, Any]] = []
    for kind, name in NAMES.items():
        single = {arm: own for arm, own in arms.items() if own[0]["kind"] == kind and len(_shares(own)) == 1}
        candidates = [row for own in single.values() for row in own if row["tokens"] == usual]
        best = {best_arm(at_budget(candidates, share)) for share in _shares(candidates)}
        chosen = sorted((own for arm, own in single.items() if arm in best), key=lambda own: own[0]["budget"])
        if chosen:
            label = f"{name}, one for each share" if len(chosen) > 1 else chosen[0][0]["arm"]
            drawn = [_point(rows, own, relative) for own in chosen]
            lines.append({"label": label, "kind": kind, "several": False, "points": drawn})
        points += [
            {"label": _named(arm, own, usual), "kind": kind, **_point(rows, own, relative)}
            for arm, own in single.items()
            if arm not in best
        ]
    for arm, own in arms.items():
        shares = _shares(own)
        if len(shares) > 1:
            drawn = [_point(rows, at_budget(own, share), relative) for share in shares]
            lines.append(
                {
                    "label": f"{_named(arm, own, usual)}: one model",
                    "kind": own[0]["kind"],
                    "several": True,
                    "points": drawn,
                }
            )
    level_of = _twin(rows, next(iter(arms.values()))) if relative else None
    return {"relative": relative, "lines": lines, "points": points, "levels": _levels(rows, level_of)}


def _shares(rows: Sequence[Row]) -> list[float]:
    return sorted({row["budget"] for row in rows})


def _named(arm: str, own: Sequence[Row], usual: int) -> str:
    tokens = own[0]["tokens"]
    return arm if tokens == usual else f"{arm} ({tokens / 1e6:.2g}M tokens)"


def _twin(rows: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """The dense models of a sparse one's size, within 5%, whose tokens are closest: rows of one arm, or none."""
    near = [
        row
        for row in rows
        if row["kind"] == "dense" and size_distance(row, own[0]) <= SAME_SIZE
        and row["seed"] in {one["seed"] for one in own}
    ]  # fmt: skip
    distances = [(abs(row["tokens"] - own[0]["tokens"]), size_distance(row, own[0])) for row in near]
    closest = [row for row, distance in zip(near, distances, strict=True) if distance == min(distances)]
    best = best_arm(closest)
    return [row for row in closest if row["arm"] == best]


def _point(rows: Sequence[Row], own: Sequence[Row], relative: bool) -> dict[str, Any]:
    """Where a model at one share stands."""
    if relative:
        pair = paired_difference(own, _twin(rows, own))
        if pair is not None:
            return {"at": pair["mlp_active_fraction"], "value": pair["mean"], "stderr": pair["stderr"]}
    losses = spread([row["test_loss"] for row in own])
    active = sum(row["mlp_active_fraction"] for row in own) / len(own)
    return {"at": active, "value": losses["mean"], "stderr": losses["stderr"]}


def _levels(rows: Sequence[Row], twin: Sequence[Row] | None) -> list[dict[str, Any]]:
    """Of each dense model its loss, or its difference to the twin; models that share no seed with that are left out."""
    dense: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["kind"] == "dense":
            dense[row["arm"]].append(row)
    if twin is None:
        return [
            {"label": arm, "value": spread([row["test_loss"] for row in own])["mean"]}
            for arm, own in dense.items()
        ]
    pairs = {arm: paired_difference(own, twin) for arm, own in dense.items()}
    return [{"label": arm, "value": pair["mean"]} for arm, pair in pairs.items() if pair is not None]
