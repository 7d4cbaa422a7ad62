"""What the models of a study lose at each active share: means over seeds, paired differences, table and plot."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.accounting.table import markdown_table
from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.spread import interval_cells, shown, spread
from dsmoe.study.tabulate import flops_notes, machine_notes, mean_flops

Row = Mapping[str, Any]
MOST_ACTIVE = 0.36  # "a third": the largest share of the headline's gap to the dense twin
SAME_SIZE = 0.05  # models whose total parameters differ by at most that share are of equal size: routers cost a little


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The paired differences on the test split that decide between the kinds.

    An arm that stands against others of its kind is chosen by its validation loss, on what all of them were judged at; of
    DS-MoEs the best at each budget. A DS-MoE is compared with models of its total size (within 5%) only. Differences are
    taken seed by seed.

    Args:
        rows: of `dsmoe.report.budgets.measured_rows`.

    Returns:
        "arms": {"dense" (the twin: as many tokens, of the sizes within 5% the closest), "dsmoe": name or None};
        "dsmoe_gap_to_dense": of the largest share up to 0.36; by budget "dsmoe_minus_dense", "dsmoe_minus_smoe" (the SMoE
        of that share with as many tokens) and "dsmoe_minus_smoe_of_more_tokens" (SMoEs that were given more), each
        difference {"arm", "other", "mean", "stderr", "interval", "seeds", "mlp_active_fraction"}; "several_budgets": the
        same five of each DS-MoE that was trained for several budgets, by arm, where there are other DS-MoEs. Parts
        without a pair are missing (None for the gap).
    """
    sparse = [row for row in rows if row["kind"] == "dsmoe" and row["budget"] < 1]
    found = _against_others(rows, sparse)
    trained: dict[str, set[float]] = defaultdict(set)
    for row in sparse:
        if row.get("trained"):
            trained[row["arm"]].add(row["budget"])
    several = [arm for arm, budgets in trained.items() if len(budgets) > 1]
    if several and len({row["arm"] for row in sparse}) > 1:
        found["several_budgets"] = {
            arm: _against_others(rows, [row for row in sparse if row["arm"] == arm]) for arm in several
        }
    return found


def _against_others(rows: Sequence[Row], sparse: Sequence[Row]) -> dict[str, Any]:
    """What `summarise` says of these rows of DS-MoEs."""
    own = {}
    for budget in sorted({row["budget"] for row in sparse}):
        best = _best(_at(sparse, budget))
        own[budget] = [row for row in _at(sparse, budget) if row["arm"] == best]
    third = max((budget for budget in own if budget <= MOST_ACTIVE), default=None)
    ours = own[third] if third is not None else []
    dense = _best(_dense_twins(rows, ours))
    found: dict[str, Any] = {"arms": {"dense": dense, "dsmoe": ours[0]["arm"] if ours else None}}
    found |= {
        name: {} for name in ("dsmoe_minus_dense", "dsmoe_minus_smoe", "dsmoe_minus_smoe_of_more_tokens")
    }
    for budget, at in own.items():
        smoes = [row for row in rows if row["kind"] == "smoe" and abs(row["budget"] - budget) < 1e-6]
        smoes = [row for row in smoes if _distance(row, at[0]) <= SAME_SIZE]
        tokens = at[0]["tokens"]
        for name, rivals in (
            ("dsmoe_minus_dense", _dense_twins(rows, at)),
            ("dsmoe_minus_smoe", [row for row in smoes if row["tokens"] == tokens]),
            ("dsmoe_minus_smoe_of_more_tokens", [row for row in smoes if row["tokens"] > tokens]),
        ):
            best = _best(rivals)
            pair = _difference(at, [row for row in rivals if row["arm"] == best])
            if pair:
                found[name][f"{budget:g}"] = pair
    found["dsmoe_gap_to_dense"] = found["dsmoe_minus_dense"].get(f"{third:g}") if third is not None else None
    return found


def _distance(row: Row, other: Row) -> float:
    """How far apart the total sizes are, as a share of the second."""
    return abs(row["num_params_total"] - other["num_params_total"]) / other["num_params_total"]


def _dense_twins(rows: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """The dense models that a DS-MoE is compared with: of as many tokens, and the closest in size within 5%.

    Without a DS-MoE there is nothing to compare, and all of them are returned.
    """
    dense = [row for row in rows if row["kind"] == "dense"]
    if not own:
        return dense
    near = [row for row in dense if row["tokens"] == own[0]["tokens"] and _distance(row, own[0]) <= SAME_SIZE]
    closest = min((_distance(row, own[0]) for row in near), default=0.0)
    return [row for row in near if _distance(row, own[0]) == closest]


def _at(rows: Sequence[Row], budget: float) -> list[Row]:
    return [row for row in rows if row["budget"] == budget]


def _best(rows: Sequence[Row]) -> str | None:
    """The arm with the lowest mean validation loss over the budgets and seeds that all arms have.

    Where there are none, over those that most have, and arms without any of these stay out.
    """
    places: dict[str, dict[tuple[float, int], float]] = defaultdict(dict)
    for row in rows:
        places[row["arm"]][row["budget"], row["seed"]] = row["validation_loss"]
    shared = Counter(place for losses in places.values() for place in losses)
    most = max(shared.values(), default=0)
    means = {}
    for arm, losses in places.items():
        common = [loss for place, loss in losses.items() if shared[place] == most]
        if common:
            means[arm] = sum(common) / len(common)
    return min(means, key=lambda arm: means[arm], default=None)


def _difference(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any] | None:
    other = {row["seed"]: row["test_loss"] for row in second}
    common = [row for row in first if row["seed"] in other]
    if not common:
        return None
    differences = spread([row["test_loss"] - other[row["seed"]] for row in common])
    active = sum(row["mlp_active_fraction"] for row in common) / len(common)
    return {
        "arm": common[0]["arm"],
        "other": second[0]["arm"],
        **{name: differences[name] for name in ("mean", "stderr", "interval")},
        "seeds": [row["seed"] for row in common],
        "mlp_active_fraction": active,
    }


def table(results: Row) -> str:
    """Every arm at every budget, then the differences, as Markdown."""
    points = defaultdict(list)
    for row in results["runs"]:
        points[row["arm"], row["budget"]].append(row)
    lines = []
    for (arm, budget), same in points.items():
        first = same[0]
        lines.append(
            [
                arm, "" if budget == 1 else f"{budget:.1%}",
                f"{sum(row['mlp_active_fraction'] for row in same) / len(same):.1%}",
                str(len(same)), f"{first['num_params_total'] / 1e6:.2f}M", f"{first['tokens'] / 1e6:.2f}M",
                f"{mean_flops(same):.2e}", f"{sum(row['training_seconds'] for row in same) / len(same) / 60:.1f}",
                *(shown(spread([row[f"{split}_loss"] for row in same])) for split in ("validation", "test")),
            ]
        )  # fmt: skip
    header = ["arm", "budget", "MLP active", "seeds", "total", "tokens", "FLOPs", "minutes", "validation loss",
              "test loss"]  # fmt: skip
    pairs = _pairs(results["summary"])
    for summary in results["summary"].get("several_budgets", {}).values():
        pairs += [pair for pair in _pairs(summary) if pair not in pairs]
    text = markdown_table(header, lines)
    if pairs:
        text += "\n\n" + markdown_table(
            ["difference on test", "MLP active", "seeds", "nats per token", "95% interval", ""], pairs
        )
    arms = defaultdict(list)
    for row in results["runs"]:
        arms[row["arm"]].append(row)
    runs = {f"{row['arm']}-s{row['seed']}": row for row in results["runs"]}
    notes = [*flops_notes(arms.items()), *machine_notes(runs.items())]
    return text + "".join(f"\n\n{note}" for note in notes)


def _pairs(summary: Row) -> list[list[str]]:
    """The rows of differences of `_against_others`."""
    return [
        [f"{pair['arm']} - {words}{pair['other']}, {float(budget):.1%}", *_cells(pair)]
        for name, words in (
            ("dsmoe_minus_dense", ""),
            ("dsmoe_minus_smoe", ""),
            ("dsmoe_minus_smoe_of_more_tokens", "more tokens: "),
        )
        for budget, pair in summary[name].items()
    ]


def _cells(pair: Row) -> list[str]:
    return [
        f"{pair['mlp_active_fraction']:.1%}", str(len(pair["seeds"])), shown(pair, sign=True), *interval_cells(pair),
    ]  # fmt: skip


def budgets_plot(results: Row, path: Path) -> None:
    """Test loss against the active share of the MLP; the dense models as lines."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    arms = defaultdict(list)
    for row in results["runs"]:
        arms[row["arm"]].append(row)
    # arms of one kind share its colour, so they differ in the line and the filling of the marker
    looks = {
        kind: itertools.cycle([("-", "full"), ("--", "none"), (":", "left"), ("-.", "right")])
        for kind in KIND_COLOURS
    }
    for arm, rows in arms.items():
        kind = rows[0]["kind"]
        if kind == "dense":
            level = sum(row["test_loss"] for row in rows) / len(rows)
            axes.axhline(level, color=KIND_COLOURS[kind], linestyle="--", linewidth=1)
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "ha": "right",
                "va": "bottom",
                "fontsize": 8,
            }
            axes.annotate(arm, (1.0, level), **place)
            continue
        points = [_at(rows, budget) for budget in sorted({row["budget"] for row in rows})]
        # a DS-MoE with all experts is a point of its own, far to the right
        points = [same for same in points if kind != "dsmoe" or same[0]["budget"] < 1]
        losses = [spread([row["test_loss"] for row in same]) for same in points]
        line, filling = next(looks[kind])
        axes.errorbar(
            [sum(row["mlp_active_fraction"] for row in same) / len(same) for same in points],
            [loss["mean"] or 0.0 for loss in losses], yerr=[loss["stderr"] or 0.0 for loss in losses],
            color=KIND_COLOURS[kind], marker="o" if kind == "dsmoe" else "^", label=arm, capsize=2,
            linestyle=line, fillstyle=filling,
        )  # fmt: skip
    axes.set_xlabel("active share of the MLP")
    axes.set_ylabel("test loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    save_figure(figure, path)
