"""The tables of a sparsity sweep, as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe.accounting.table import markdown_table

Row = Mapping[str, Any]
WITHIN = "within 2 SE of the bound"


def comparison_rows(results: Row) -> list[dict[str, Any]]:
    """At each share: loss increases of uniform K, global threshold and what calibration chooses, on held-out text."""
    found = []
    for row in results["calibrated"][0]:
        entry = {
            "asked": row["asked"],
            "share": row["share"],
            "calibrated": row["loss_increase"],
            "standard_error": row["standard_error"],
        }
        entry["family"] = row["family"]
        for family in ("uniform_k", "global_threshold"):
            same = [
                r["loss_increase"]
                for r in results["rows"]
                if (r["family"], r["asked"]) == (family, row["asked"])
            ]
            entry[family] = same[0] if same else None
        others = [
            one["loss_increase"]
            for sample in results["calibrated"]
            for one in sample
            if one["asked"] == row["asked"]
        ]
        entry["range_over_samples"] = max(others) - min(others) if len(others) > 1 else None
        entry["task_average"] = row.get("task_average")
        found.append(entry)
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def tables(results: Row) -> str:
    """The sweep as Markdown: shares, all families, bounds."""
    shares = [
        [f"{e['asked']:.1%}", f"{e['share']:.1%}", _nats(e["uniform_k"]), _nats(e["global_threshold"]),
         _nats(e["calibrated"]), f"{e['standard_error']:.4f}", _number(e["range_over_samples"]),
         "" if not e["task_average"] else f"{100 * e['task_average'][0]:.1f}"]
        for e in comparison_rows(results)
    ]  # fmt: skip
    header = [
        "active, asked",
        "calibrated has",
        "uniform K",
        "global threshold",
        "calibrated",
        "its SE",
        "range over samples",
        "tasks",
    ]
    if not any(row[-1] for row in shares):
        header, shares = header[:-1], [row[:-1] for row in shares]
    calibrated, held_out = results["text"]["calibration"][0], results["text"]["held_out"]
    return "\n\n".join(
        (
            f"Loss increase in nats per token over the checkpoint as it is ({results['reference']['loss']:.4f}), on "
            f"{held_out['num_tokens']:,} tokens of split {held_out['split']!r}; policies chosen on "
            f"{calibrated['num_tokens']:,} tokens of split {calibrated['split']!r}, "
            f"{len(results['calibrated'])} sample(s). Active: share of experts, weighted by their parameters, on the "
            "held-out text.",
            markdown_table(header, shares),
            _families_table(results),
            _bounds_table(results["bounds"]),
            _below_bound(results["bounds"]),
        )
    )


def _families_table(results: Row) -> str:
    """Every family and score at every share."""
    by_key = {(row["family"], row["score"], row["asked"]): row for row in results["rows"]}
    rows = [
        [f"{family}, {score}", *(_nats((by_key.get((family, score, share)) or {}).get("loss_increase"))
                                 for share in results["shares"])]
        for family, score in dict.fromkeys((row["family"], row["score"]) for row in results["rows"])
    ]  # fmt: skip
    return markdown_table(["all families", *(f"{share:.1%}" for share in results["shares"])], rows)


def _bounds_table(bounds: Sequence[Row]) -> str:
    """Bounds on the loss, and what the models chosen under them measure."""
    rows = [
        [
            f"{entry['bound']:g}",
            *(cell for name in ("calibrated", "uniform_k") for cell in _bound_cells(entry[name])),
        ]
        for entry in bounds
    ]
    columns = ("increase", "SE", "active", WITHIN)
    header = ["bound"]
    for name in ("calibrated", "uniform K"):
        header += [f"{name}: {columns[0]}", *columns[1:]]
    return markdown_table(header, rows)


def _below_bound(bounds: Sequence[Row]) -> str:
    """How many measured increases don't exceed their bound at all, which is more than the table's column says."""
    calibrated, uniform = (
        sum(entry[name]["below_bound"] for entry in bounds) for name in ("calibrated", "uniform_k")
    )
    return (
        f"Measured increases below their bound outright, with no standard error (SE) allowed for: {calibrated} of "
        f"{len(bounds)} calibrated, {uniform} of {len(bounds)} of uniform K."
    )


def _bound_cells(row: Row) -> list[str]:
    share = row["share"]
    return [
        _nats(row["loss_increase"]),
        f"{row['standard_error']:.4f}",
        f"{share:.1%}",
        "yes" if row["holds"] else "NO",
    ]


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
