"""Laws of the routed models of arXiv 2202.01169 (num_experts up to 512): `eval/fit_routed.py`.

The data are github.com/google-deepmind/scaling_laws_for_routing (CC BY 4.0). Differences to the joint law's own runs:
every other block is routed, so E experts add less than E full models; N leaves embeddings out; D is nearly the same for
all runs.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsmoe.accounting.table import markdown_table
from dsmoe.planner.fit.fitting import LawFit, Settings, fit_law
from dsmoe.planner.fit.report import as_json
from dsmoe.planner.fit.runs import Run
from dsmoe.planner.fit.tables import read_table

ROUTERS = ("S-Base", "RL-R", "Hash")
# flops_per_step is of a forward: at d = 1536 and 12 blocks it equals 2 (N + unembedding) plus the scores of attention for
# 524,288 tokens, i.e. 256 sequences of 2048; 250,000 steps are then 131B tokens
TOKENS_PER_STEP = 524_288
MAPPING = {
    "num_params_active": "dense_parameter_count",
    "num_params_total": "total_parameter_count",
    "tokens": f"step*{TOKENS_PER_STEP}",
    "loss": "loss_validation",
    "name": "hyper_id",
}
# the same arithmetic gives a vocabulary of 32,000, with one table for embedding and unembedding
EMBEDDINGS = "32000*d_model"
LAST_STEPS = ("248000", "249000", "250000")
STEPS = ("60000", "120000", "180000")  # of the fit with several steps, besides the last ones


def read_router(
    path: Path, router: str, several_steps: bool = False, embeddings: bool = False
) -> tuple[list[Run], list[str]]:
    """Runs of one router and the dense ones at their last step (or at several), all with one routed block in two, top-1.

    Args:
        path: the CSV file.
        router: one of ROUTERS.
        several_steps: also take STEPS.
        embeddings: count them in N, as the joint law does; the columns leave them out.
    """
    where: dict[str, Sequence[str]] = {
        "router_type": ("Dense", router), "k": ("1",), "flop_increase": ("1.0",), "routing_frequency": ("0.5",),
        "step": LAST_STEPS,
    }  # fmt: skip
    mapping = dict(MAPPING)
    if embeddings:
        for field in ("num_params_active", "num_params_total"):
            mapping[field] += f"+{EMBEDDINGS}"
    runs, notes = read_table(path, mapping, where, "hyper_id", skip_empty=True)
    if several_steps:
        runs += read_table(path, mapping, {**where, "step": STEPS}, skip_empty=True)[0]
    return runs, notes


def fit_router(path: Path, router: str, draws: int = 200) -> tuple[LawFit, dict[str, Any]]:
    """Fit one router's law, without the largest models in two senses, and with several steps of each run.

    Returns:
        The fit of the final losses (held out: the runs with most active parameters), and everything as JSON.
    """
    runs, notes = read_router(path, router)
    largest = max(run.num_params_active for run in runs)
    share = sum(run.num_params_active == largest for run in runs) / len(runs)
    # by operations, which here means by active parameters
    settings = Settings(draws=draws, hold_out=share - 1e-9, hold_out_by="flops")
    fit = fit_law(runs, settings)
    by_total = fit_law(runs, replace(settings, draws=0, hold_out=0.15, hold_out_by="num_params_total"))
    several, _ = read_router(path, router, several_steps=True)
    embedded = fit_law(read_router(path, router, embeddings=True)[0], replace(settings, draws=0))
    curves = fit_law(several, replace(settings, draws=0, hold_out=0.0))
    content = as_json(fit)
    del content["bootstrap"]
    content["notes"] += notes
    content["held_out_num_params_active"] = largest
    content["rmse_held_out_by_total"] = by_total.rmse_held_out
    content["held_out_runs_by_total"] = len(by_total.held_out)
    content["with_embeddings"] = {
        "rmse_train": embedded.rmse_train,
        "rmse_held_out": embedded.rmse_held_out,
        "coefficients": embedded.values,
    }
    content["several_steps"] = {
        "steps": [*STEPS, "last"],
        "runs": len(several),
        "rmse_train": curves.rmse_train,
        "coefficients": curves.values,
        "caveat": "intermediate losses stand inside one learning-rate schedule: these D coefficients describe a training "
        "curve, not runs of different length",
    }  # fmt: skip
    errors = [
        (entry["num_experts"], entry["predicted_held_out"] - entry["loss"])
        for entry in content["residuals"]
        if entry["predicted_held_out"] is not None
    ]
    content["held_out_errors"] = [{"num_experts": e, "predicted_minus_measured": d} for e, d in errors]
    return fit, content


def summary_table(results: dict[str, dict[str, Any]]) -> str:
    """Errors by router as Markdown."""
    rows = []
    for router, content in results.items():
        errors = [entry["predicted_minus_measured"] for entry in content["held_out_errors"]]
        loose = [n for n, e in content["coefficients"].items() if not e["identified"] and not e["fixed"]]
        fixed = [n for n, e in content["coefficients"].items() if e["fixed"]]
        rows.append((
            router, str(content["runs"]), f"{content['rmse_train']:.4f}",
            f"{content['rmse_held_out']:.4f} ({content['held_out_runs']})", f"{min(errors):+.3f} to {max(errors):+.3f}",
            f"{content['rmse_held_out_by_total']:.4f} ({content['held_out_runs_by_total']})",
            f"{content['with_embeddings']['rmse_held_out']:.4f}",
            f"{content['several_steps']['rmse_train']:.4f}", ", ".join(loose) or "-", ", ".join(fixed) or "-",
        ))  # fmt: skip
    header = (
        "router", "runs", "RMSE, all", "RMSE, 1.3B held out (runs)", "its errors", "RMSE, 15% largest totals held out",
        "1.3B held out, N with embeddings", "RMSE, several steps", "not identified", "fixed",
    )  # fmt: skip
    return markdown_table(header, rows, left=(0, 8, 9))


def coefficient_table(results: dict[str, dict[str, Any]]) -> str:
    """Coefficients by router as Markdown, with 90% intervals."""
    names = list(next(iter(results.values()))["coefficients"])
    rows = []
    for name in names:
        cells = []
        for content in results.values():
            entry = content["coefficients"][name]
            span = entry["interval"]
            mark = "fixed" if entry["fixed"] else f"[{span[0]:.4g}, {span[1]:.4g}]" if span else "-"
            loose = "" if entry["identified"] or entry["fixed"] else " not identified"
            cells.append(f"{entry['value']:.4g} {mark}{loose}")
        rows.append((name, *cells))
    return markdown_table(("coefficient", *results), rows, left=(0, 1, 2, 3))
