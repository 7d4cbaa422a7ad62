"""What a fit says, as JSON and as text."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsmoe.accounting.table import markdown_table
from dsmoe.planner.fit.bootstrap import interval
from dsmoe.planner.fit.decisions import decide, reduced
from dsmoe.planner.fit.fitting import LawFit
from dsmoe.planner.laws import COEFFICIENTS, tie_band


def as_json(fit: LawFit, decide_flops: Sequence[float] = ()) -> dict[str, Any]:
    """The fit in the form that `dsmoe plan --law` reads, numbers at full precision.

    Args:
        fit: the fit.
        decide_flops: training budgets to decide on; none: the largest of the runs, and ten times that.
    """
    largest = max(run.training_flops for run in fit.runs)
    budgets = list(decide_flops) or [largest, 10 * largest]
    values, draws = _with_eta(fit)
    notes = list(fit.notes)
    drawn = _plannable(draws)
    if fit.draws and len(drawn) < len(fit.draws["alpha"]):
        missing = len(fit.draws["alpha"]) - len(drawn)
        notes.append(
            f"in {missing} of {len(fit.draws['alpha'])} bootstrap draws a dense loss does not fall with both "
            "N and D, so they have no optimum; they count in the intervals here and are left out of bootstrap"
        )
    return {
        "law": fit.structure.law,
        "dsmoe_form": fit.structure.dsmoe_form,
        "coefficients": {name: _coefficient(fit, name, values, draws) for name in values},
        "rmse_train": fit.rmse_train,
        "rmse_held_out": fit.rmse_held_out,
        "runs": len(fit.runs),
        "held_out_runs": len(fit.held_out),
        "range": ranges(fit),
        "vocab_size": _vocabulary(fit),
        "decisions": decisions(fit, budgets),
        "notes": notes,
        "bic": fit.bic,
        "bootstrap": drawn,
        "residuals": residuals(fit),
    }


def _with_eta(fit: LawFit) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Coefficients of the fit and of its draws; with kappa also eta at the median number of experts."""
    values, draws = dict(fit.values), dict(fit.draws)
    if fit.structure.dsmoe_form == "kappa":
        both = fit.eta(typical_dsmoe_experts(fit))
        assert both is not None
        values["eta"] = float(both[0][0])
        if draws:
            draws["eta"] = both[1]
    return values, draws


def typical_dsmoe_experts(fit: LawFit) -> float:
    """Median number of experts of the DS-MoEs among the runs."""
    return float(np.median([run.num_experts for run in fit.runs if run.kind == "dsmoe"]))


def _plannable(draws: dict[str, np.ndarray]) -> list[dict[str, float]]:
    """Draws by which the planner can size a dense model: loss falls with parameters and with tokens."""
    if not draws:
        return []
    with np.errstate(all="ignore"):
        m, mu, n, nu = reduced(draws, 1.0)
        usable = (mu < 0) & (nu < 0) & (m > 0) & (n > 0)
    usable &= np.all([np.isfinite(values) for values in draws.values()], axis=0)
    return [{name: float(values[i]) for name, values in draws.items()} for i in np.flatnonzero(usable)]


def _coefficient(fit: LawFit, name: str, values: Any, draws: Any) -> dict[str, Any]:
    profiled = "kappa" if name == "eta" and fit.structure.dsmoe_form == "kappa" else name
    profile = fit.profiles.get(profiled)
    return {
        "value": values[name],
        "interval": interval(draws[name]) if name in draws and profile is not None else None,
        "identified": fit.identified(profiled),
        "fixed": profile is None,
        "profile_change_nats": None if profile is None or not np.isfinite(profile.change) else profile.change,
    }


def ranges(fit: LawFit) -> dict[str, list[float]]:
    """Smallest and largest of what the law was fitted on; of a DS-MoE, all parameters count as the law's N."""
    sizes = [run.num_params_total if run.kind == "dsmoe" else run.num_params_active for run in fit.runs]
    ratios = [run.tokens / size for run, size in zip(fit.runs, sizes)]
    experts = [1.0 if run.kind == "dsmoe" else run.num_experts for run in fit.runs]
    tokens, flops = [run.tokens for run in fit.runs], [run.training_flops for run in fit.runs]
    found = {"num_params_active": sizes, "tokens_per_param": ratios, "num_experts": experts, "tokens": tokens,
             "flops": flops}  # fmt: skip
    dsmoe = [run.num_experts for run in fit.runs if run.kind == "dsmoe"]
    if dsmoe:
        found["dsmoe_num_experts"] = dsmoe
    shares = [run.active_share for run in fit.runs if run.kind == "dsmoe" and run.active_share is not None]
    if dsmoe and len(shares) == len(dsmoe):  # tables don't tell it
        found["dsmoe_active_share"] = shares
    return {name: [float(min(values)), float(max(values))] for name, values in found.items()}


def _vocabulary(fit: LawFit) -> int | None:
    """Entries of the embedding table where all runs have one number of them and tell it; None: not known."""
    sizes = {run.vocab_size for run in fit.runs}
    return sizes.pop() if len(sizes) == 1 else None


def decisions(fit: LawFit, budgets: Sequence[float]) -> list[dict[str, Any]]:
    """`decide` for each budget; none where the law has no term of N or of D, so that there is nothing to balance."""
    if not (fit.structure.has_size and fit.structure.has_tokens):
        return []
    values = {name: np.array([value]) for name, value in fit.values.items()}
    # without a bootstrap there are no draws, hence no intervals and no shares
    draws = fit.draws or {name: np.array([]) for name in values}
    eta = None if fit.structure.dsmoe_form is None else fit.eta(typical_dsmoe_experts(fit))
    band = tie_band(fit.rmse_train)
    return [decide(values, draws, fit.runs, float(flops), eta, band) for flops in budgets]


def residuals(fit: LawFit) -> list[dict[str, Any]]:
    """One entry a run: what it is, the loss that was measured and the one that is fitted (and was predicted)."""
    predicted = dict(zip(fit.held_out, fit.held_out_predictions))
    return [
        {
            "name": run.name, "kind": run.kind, "num_experts": run.num_experts, "seed": run.seed,
            "num_params_active": run.num_params_active, "num_params_total": run.num_params_total,
            "tokens": run.tokens, "loss": run.loss, "fitted": float(fitted), "residual": run.loss - float(fitted),
            "predicted_held_out": predicted.get(index),
        }
        for index, (run, fitted) in enumerate(zip(fit.runs, fit.predict(fit.runs)))
    ]  # fmt: skip


def human_report(content: dict[str, Any]) -> str:
    """The same as text: coefficients, errors, decisions, notes."""
    order = [*COEFFICIENTS, "eta", "kappa"]
    rows = []
    for name in sorted(content["coefficients"], key=order.index):
        entry = content["coefficients"][name]
        state = "fixed" if entry["fixed"] else "yes" if entry["identified"] else "NO"
        rows.append((name, f"{entry['value']:.5g}", _span(entry["interval"], ".4g"), state))
    held_out = content["rmse_held_out"]
    shown = "none" if held_out is None else f"{held_out:.4f} nats ({content['held_out_runs']} largest runs)"
    lines = [
        f"law {content['law']}, {content['runs']} runs",
        f"error: {content['rmse_train']:.4f} nats on all runs; held out {shown}",
        "",
        markdown_table(("coefficient", "value", "90% interval", "identified"), rows),
    ]
    for decision in content["decisions"]:
        lines += ["", *_decision_lines(decision)]
    lines += ["", *(f"note: {note}" for note in content["notes"])]
    return "\n".join(lines).rstrip()


def _decision_lines(decision: dict[str, Any]) -> list[str]:
    rows = []
    for option in decision["options"]:
        size = option["num_params_total" if option["kind"] == "dsmoe" else "num_params_active"]
        cells = [
            f"{_short(e['value'], '.3g')} {_span(e['interval'], '.3g')}" for e in (size, option["tokens"])
        ]
        loss = option["loss"]
        cells.append(f"{_short(loss['value'], '.3f')} {_span(loss['interval'], '.3f')}")
        share = option.get("share_best")
        marks = " ".join(name for name in ("tie", "extrapolated") if option.get(name))
        rows.append((f"{option['kind']} E={option['num_experts']:g}", *cells,
                     "-" if share is None else f"{share:.0%}", marks or "-"))  # fmt: skip
    title = (
        f"{decision['flops']:.3g} training FLOPs (no limit on memory or tokens; N of a DS-MoE is its total)"
    )
    return [title, markdown_table(("model", "N", "D", "loss", "best in", "marks"), rows)]


def _short(value: float | None, form: str) -> str:
    return "no optimum" if value is None else f"{value:{form}}"


def _span(values: Sequence[float] | None, form: str) -> str:
    return "-" if values is None else f"[{values[0]:{form}}, {values[1]:{form}}]"
