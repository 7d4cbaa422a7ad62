"""The residual plot of a fit, as PNG. matplotlib is imported only when one is drawn."""

from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.figures import pyplot, save_figure
from dsmoe.planner.fit.fitting import LawFit
from dsmoe.planner.fit.forms import Array
from dsmoe.planner.laws import TIE_BAND

MARKERS = {"dense": "o", "smoe": "s", "dsmoe": "^"}


def residual_plot(fit: LawFit, path: str | Path, title: str = "") -> None:
    """Residuals of the fit to all runs against size, and of the largest runs as a fit without them predicted them.

    Args:
        fit: the fit.
        path: the PNG.
        title: above the plots.
    """
    plt = pyplot()
    loss = np.array([run.loss for run in fit.runs])
    # the sweep's own order of size, as the held-out runs were chosen by it
    size = np.array([run.num_params_total for run in fit.runs])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    experts = sorted({run.num_experts for run in fit.runs})
    colours = dict(zip(experts, plt.get_cmap("viridis")(np.linspace(0.0, 0.9, len(experts)))))
    residual = loss - fit.predict(fit.runs)
    for kind, marker in MARKERS.items():
        for number in experts:
            chosen = [i for i, run in enumerate(fit.runs) if run.kind == kind and run.num_experts == number]
            if chosen:
                label = f"{kind} E={number:g}" if kind != "dense" else "dense"
                left.scatter(
                    size[chosen], residual[chosen], 20, color=colours[number], marker=marker, label=label
                )
    left.axhspan(-TIE_BAND, TIE_BAND, color="grey", alpha=0.15, linewidth=0)
    left.set(xscale="log", xlabel="total parameters", ylabel="measured - fitted loss (nats)")
    left.set_title(f"fit to all {len(fit.runs)} runs, RMSE {fit.rmse_train:.4f}")
    figure.legend(
        *left.get_legend_handles_labels(), fontsize=8, ncols=6, loc="outside lower center", frameon=False
    )
    _held_out(fit, right, loss, colours)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    save_figure(figure, path)


def _held_out(fit: LawFit, axes: Any, loss: Array, colours: dict[float, Any]) -> None:
    held = list(fit.held_out)
    if not held:
        axes.scatter(fit.predict(fit.runs), loss, 16, [colours[run.num_experts] for run in fit.runs])
        axes.set(xlabel="fitted loss (nats)", ylabel="measured loss (nats)", title="no runs held out")
        span = [loss.min(), loss.max()]
    else:
        predicted = np.array(fit.held_out_predictions)
        shades = [colours[fit.runs[index].num_experts] for index in held]
        for kind, marker in MARKERS.items():
            some = [place for place, index in enumerate(held) if fit.runs[index].kind == kind]
            if some:
                axes.scatter(predicted[some], loss[held][some], 28, [shades[i] for i in some], marker=marker)
        both = np.concatenate([predicted, loss[held]])
        span = [both.min(), both.max()]
        axes.set(xlabel="loss predicted without them (nats)", ylabel="measured loss (nats)")
        axes.set_title(f"{len(held)} largest runs held out, RMSE {fit.rmse_held_out:.4f}")
    axes.plot(span, span, color="grey", linewidth=1)
