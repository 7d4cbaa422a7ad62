"""The pictures of a study: losses with their spread over seeds, paired differences, curves of them, its routers."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.spread import is_tie
from dsmoe.study.tabulate import point_name, split_of


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


def pairs_plot(results: Mapping[str, Any], path: str | Path) -> None:
    """Paired differences, one row each: every seed, their mean and its 95% interval.

    Black where the interval leaves out zero; wide intervals, as two seeds have, are cut off.

    Args:
        results: of `dsmoe.study.tabulate.collect`, with at least one pair; differences on test where they were measured.
        path: the PNG.
    """
    pairs = results["pairs"]
    split = split_of(pairs)
    figure, axes = pyplot().subplots(figsize=(7.5, 1.2 + 0.28 * len(pairs)))
    axes.axvline(0, color="#888888", linewidth=0.8)
    for place, pair in enumerate(pairs):
        difference = pair.get(split)
        if difference is None:
            continue
        told = is_tie(difference) is False
        colour = "black" if told else "#8a8a8a"
        seeds = difference["differences"]
        axes.plot(seeds, [place] * len(seeds), "o", markersize=5, markerfacecolor="none", color=colour)
        if difference["interval"] is not None:
            axes.plot(difference["interval"], [place, place], "-", color=colour, linewidth=1.2)
            axes.plot([difference["mean"]], [place], "D", markersize=5, color=colour)
    # two seeds have an interval of 12.7 standard errors either way, beside which nothing else could be seen
    seeds = [value for pair in pairs if split in pair for value in pair[split]["differences"]]
    room = 0.6 * (max([0.0, *seeds]) - min([0.0, *seeds])) or 1.0
    axes.set_xlim(min([0.0, *seeds]) - room, max([0.0, *seeds]) + room)
    axes.set_yticks(range(len(pairs)), [f"{pair['first']} - {pair['second']}" for pair in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        f"difference on {split} (nats per token; left of zero: the first is better)\n"
        "rings: seeds; diamond and bar: mean and 95% interval, black where it leaves out zero",
        fontsize=8,
    )
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


def routers_plot(
    courses: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]], path: str | Path
) -> None:
    """Balance and choice of routers against tokens, one row a part.

    Args:
        courses: of `dsmoe.study.routers.router_courses`, with at least one run.
        path: the PNG.
    """
    plt = pyplot()
    figure, rows = plt.subplots(
        len(courses), 2, figsize=(10.5, 3.6 * len(courses)), squeeze=False, sharex=True, sharey=True
    )
    for (part, runs), panels in zip(courses.items(), rows):
        colours = plt.get_cmap("turbo")
        for place, (name, course) in enumerate(runs.items()):
            colour = colours(place / max(1, len(runs) - 1))
            tokens = [line[0] for line in course]
            for panel, at in zip(panels, (1, 2)):
                panel.plot(tokens, [line[at] for line in course], color=colour, linewidth=1.2, label=name)
        panels[0].set_ylabel(f"{part} routers, mean over layers")
        panels[0].set_title("balance: H(mean p) / log N (1: all experts alike)", fontsize=9)
        panels[1].set_title("choice: mean H(p) / log N (0: one expert a token)", fontsize=9)
        panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
        for panel in panels:
            panel.grid(alpha=0.3)
            panel.set_xlabel("tokens")
    save_figure(figure, path)
