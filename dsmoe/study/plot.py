"""The picture of a study: the loss of every point, mean and spread over seeds."""

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
