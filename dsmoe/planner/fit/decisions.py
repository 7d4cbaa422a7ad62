"""What a law advises for a training budget, and how firmly: the optimum of every bootstrap draw.

At a fixed E the loss m N**-mu + n D**-nu + c with 6 N D = F is least where both terms fall at equal rates, which has a
closed form in the absolute exponents. Training a DS-MoE costs all its parameters, so N is then N_total.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe.planner.fit.bootstrap import interval
from dsmoe.planner.fit.forms import Array
from dsmoe.planner.fit.runs import Run
from dsmoe.planner.laws import TIE_BAND

Draws = Mapping[str, Array]


def reduced(draws: Draws, num_experts: float) -> tuple[Array, Array, Array, Array]:
    """m, mu, n, nu of each draw at one E."""
    inner = num_experts - 1 + 1 / (1 / draws["e_start"] - 1 / draws["e_max"])
    effective = 1 / (1 / inner + 1 / draws["e_max"])
    h = np.log(effective)
    return (
        draws["a"] * effective ** draws["delta"],
        draws["alpha"] + draws["gamma"] * h,
        draws["b"] * effective ** draws["omega"],
        draws["beta"] + draws["zeta"] * h,
    )


def optimum(
    draws: Draws, num_experts: float, flops: float, eta: Array | float = 1.0
) -> tuple[Array, Array, Array]:
    """Parameters, tokens and loss of the compute optimum of each draw; nan where a draw has none.

    Args:
        draws: coefficients, each [S].
        num_experts: E.
        flops: training FLOPs, 6 N D.
        eta: what a parameter of a DS-MoE is worth in dense parameters; N is then N_total.

    Source: arXiv 2502.05172, compute-optimal problem; derived by setting d loss / d ln N at fixed N D to zero.
    """
    with np.errstate(all="ignore"):
        m, mu, n, nu = reduced(draws, num_experts)
        m = m * eta**mu
        usable = (mu < 0) & (nu < 0) & (m > 0) & (n > 0)
        size, data = np.where(usable, -mu, np.nan), np.where(usable, -nu, np.nan)
        log_size = (np.log(size * m / (data * n)) + data * np.log(flops / 6)) / (size + data)
        params = np.exp(log_size)
        tokens = flops / 6 / params
        return params, tokens, m * params**mu + n * tokens**nu + draws["c"]


def decide(
    value: Draws,
    draws: Draws,
    runs: Sequence[Run],
    flops: float,
    dsmoe_eta: tuple[Array, Array] | None = None,
    band: float = TIE_BAND,
) -> dict[str, Any]:
    """The advice for one budget as JSON.

    Args:
        value: the fit, each coefficient [1].
        draws: its bootstrap, each [S]; S = 0 without one, and then no interval or share is given.
        runs: those fitted: their numbers of experts are compared, and their range says what is extrapolated.
        flops: training FLOPs.
        dsmoe_eta: eta of the fit [1] and of the draws [S], where DS-MoEs were fitted.
        band: differences in loss up to this are ties (`dsmoe.planner.laws.tie_band`).

    Returns:
        "flops", "options" (one a kind and E: size, tokens and loss with 90% intervals, whether it ties with the best and
        whether it lies outside the runs) and "best" (kind and E, and the share of draws in which each option is best).
    """
    experts = sorted({run.num_experts for run in runs if run.kind != "dsmoe"})
    asked: list[tuple[str, float, Any, Any]] = [("dense" if e == 1 else "smoe", e, 1.0, 1.0) for e in experts]
    if dsmoe_eta is not None:
        asked.append(
            ("dsmoe", float(np.median([r.num_experts for r in runs if r.kind == "dsmoe"])), *dsmoe_eta)
        )
    options, losses = [], []
    for kind, number, eta, drawn_eta in asked:
        # a DS-MoE's loss is that of a dense model of eta times its size, however many experts it has
        law_at = 1.0 if kind == "dsmoe" else number
        here, spread = optimum(value, law_at, flops, eta), optimum(draws, law_at, flops, drawn_eta)
        losses.append((here[2][0], spread[2]))
        names = ("num_params_total" if kind == "dsmoe" else "num_params_active", "tokens", "loss")
        option = {"kind": kind, "num_experts": number}
        option |= {n: _with_interval(h, s) for n, h, s in zip(names, here, spread)}
        option["extrapolated"] = _outside(kind, number, here, runs)
        options.append(option)
    return {"flops": flops, "best": _best(options, losses, band), "options": options}


def _with_interval(here: Array, spread: Array) -> dict[str, Any]:
    value = float(here[0])
    return {"value": value if np.isfinite(value) else None, "interval": interval(spread)}


def _outside(kind: str, number: float, here: tuple[Array, ...], runs: Sequence[Run]) -> bool:
    alike = [run for run in runs if (run.kind == "dsmoe") == (kind == "dsmoe")]
    sizes = [run.num_params_total if kind == "dsmoe" else run.num_params_active for run in alike]
    tokens = [run.tokens for run in alike]
    return not (min(sizes) <= here[0][0] <= max(sizes) and min(tokens) <= here[1][0] <= max(tokens))


def _best(
    options: list[dict[str, Any]], losses: list[tuple[float, Array]], band: float
) -> dict[str, Any] | None:
    values = np.array([here for here, _ in losses])
    if not np.isfinite(values).any():
        return None
    least = np.nanmin(values)
    for option, here in zip(options, values):
        option["loss_gap"] = float(here - least) if np.isfinite(here) else None
        option["tie"] = bool(here - least <= band)
    drawn = np.stack([spread for _, spread in losses], axis=1)
    drawn = drawn[np.isfinite(drawn).any(axis=1)]
    winners = np.argmin(np.where(np.isfinite(drawn), drawn, np.inf), axis=1)
    for index, option in enumerate(options):
        option["share_best"] = float(np.mean(winners == index)) if len(winners) else None
    best = options[int(np.nanargmin(values))]
    return {key: best[key] for key in ("kind", "num_experts", "share_best")}
