"""Table of what the models of a study lose at each active share."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from dsmoe.accounting.table import markdown_table
from dsmoe.spread import interval_cells, shown, spread
from dsmoe.study.tabulate import flops_notes, machine_notes, mean_flops

Row = Mapping[str, Any]


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
