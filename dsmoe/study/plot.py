"""The pictures of a study: the loss of every point with its spread over seeds, and differences along curves."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.study.tabulate import point_name


def losses_plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Validation (circles) and test losses (squares) of the points, one row each, coloured by kind.

    Args:
        results: of `dsmoe.study.tabulate.collect`, with at least one run.
        path: the PNG.
    """
    kinds = {point_name(row): row["kind"] for row in results["runs"]}
    points = results["groups"]
    figure, axes = pyplot().subplots(figsize=(7.5, 1.2 + 0.28 * len(points)))
    for place, point in enumerate(points):
        colour = KIND_COLOURS[kinds[point_name(point)]]
        for split, marker in (("validation", "o"), ("test", "s")):
            loss = point.get(f"{split}_loss")
            if loss is not None:
                axes.errorbar(
                    loss["mean"], place, xerr=loss["stderr"], fmt=marker, color=colour, markersize=5, capsize=3,
                    markerfacecolor=colour if split == "validation" else "white",
                )  # fmt: skip
    axes.set_yticks(range(len(points)), [point_name(point) for point in points], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "loss (nats per token): validation filled, test hollow; bars are standard errors over seeds"
    )
    axes.xaxis.label.set_fontsize(8)
    axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)


def curves_plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Differences of every seed against tokens or parameters, one panel each, with the fitted lines.

    Args:
        results: of `dsmoe.study.tabulate.collect`, with at least one curve that has points.
        path: the PNG.
    """
    curves = [curve for curve in results["curves"] if curve["points"]]
    along = list(dict.fromkeys(curve["against"] for curve in curves))
    figure, panels = pyplot().subplots(
        1, len(along), figsize=(5.2 * len(along), 3.8), squeeze=False, sharey=True
    )
    panel_of = dict(zip(along, panels[0]))
    for curve in curves:
        panel = panel_of[curve["against"]]
        measured = [(point["at"], value) for point in curve["points"] for value in point["differences"]]
        name = f"{curve['first']} - {curve['second']}"
        drawn = panel.plot(
            [at for at, _ in measured], [value for _, value in measured], "o", markersize=4, label=name
        )
        line = curve["line"]
        if line is not None:
            low, high = line["range"]
            end = line["ahead"][0]["difference"]
            start = end - line["slope"] * math.log10(high / low)
            panel.plot([low, high], [start, end], "-", color=drawn[0].get_color())
    for against, panel in panel_of.items():
        panel.axhline(0, color="#888888", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_xlabel(against)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0][0].set_ylabel("difference on test (nats per token)")
    save_figure(figure, path)
