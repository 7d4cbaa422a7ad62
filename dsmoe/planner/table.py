"""The plan as people read it."""

from typing import Any

from dsmoe.accounting import markdown_table
from dsmoe.planner.plan import Plan
from dsmoe.planner.stability import MOST_DRAWS
from dsmoe.planner.units import format_bytes, format_count

HEADER = ("", "model", "d x layers", "heads", "MLP per expert", "mean K", "N active", "N total", "tokens", "lr", "batch",
          "loss", "gap", "memory = weights + KV", "training", "bound by", "marks")  # fmt: skip
MARKS = {
    "=": "tie: within {band:g} nats of the best, which the law can't tell apart",
    "x": "extrapolated: outside the runs that the law was fitted to, which the interval does not cover",
    "a": "assumed loss: the law says nothing about DS-MoE, and the interval does not cover that",
}


def human_table(plan: Plan) -> str:
    """Ranked table with the meaning of its marks, the law and the assumptions under it."""
    rows = [_cells(rank, row.fields) for rank, row in enumerate(plan.rows, 1)]
    shares = plan.rows[0].fields["best_or_tied_share"] is not None
    header = (*HEADER, "best or tied") if shares else HEADER
    lines = [markdown_table(header, rows, left=(1, 15, 16)), ""]
    used = {mark for cells in rows for mark in cells[16].split()}
    lines += [
        f"  {mark}  {meaning.format(band=plan.law.tie_band)}"
        for mark, meaning in MARKS.items()
        if mark in used
    ]
    for failed in plan.impossible:
        lines.append(f"  not possible: {failed['reason']}")
    interval = (
        f"90% of {len(plan.law.draws)} bootstrap draws"
        if plan.law.draws
        else f"1.64 x the fit's RMSE of {plan.law.rmse:g}"
    )
    lines += ["", f"law: {plan.law.name}; loss in nats per token, its interval {interval}"]
    if shares:
        lines.append(
            f"best or tied: share of {min(MOST_DRAWS, len(plan.law.draws))} bootstrap draws in which the row is that"
        )
    lines += [f"- {note}" for note in plan.notes]
    return "\n".join(lines)


def _cells(rank: int, row: dict[str, Any]) -> list[str]:
    name = {"dense": "dense", "smoe": "SMoE E={}", "dsmoe": "DS-MoE N={}"}[row["kind"]]
    marks = [
        mark
        for mark, on in (
            ("=", row["tie"] and rank > 1),
            ("x", row["extrapolated"]),
            ("a", row["assumed"]),
        )
        if on
    ]
    low, high = row["loss_interval"]
    half = (high - low) / 2
    memory = row["memory"]
    cells = [
        str(rank),
        name.format(row["num_experts"]),
        f"{row['hidden_size']} x {row['num_layers']}",
        str(row["num_heads"]),
        str(row["moe_intermediate_size"]),
        f"{row['mean_k']:.3g}",
        format_count(row["num_params_active"]),
        format_count(row["num_params_total"]),
        format_count(row["tokens"]),
        f"{row['learning_rate']:.2g}",
        f"{row['batch_tokens'] // 1024}K",
        f"{row['loss']:.4f} ±{half:.3f}",
        f"{row['loss_gap']:.4f}",
        format_bytes(row["memory_bytes"])
        + (
            f" = {format_bytes(memory['weights'])} + {format_bytes(memory['kv_cache'])}"
            if memory["kv_cache"]
            else ""
        ),
        format_bytes(row["training_memory_bytes"]),
        ", ".join(row["binding"]),
        " ".join(marks),
    ]
    if row["best_or_tied_share"] is not None:
        cells.append(f"{row['best_or_tied_share']:.0%}")
    return cells
