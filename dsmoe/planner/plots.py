"""Plots of a plan, as PNG. matplotlib is imported only when one is drawn."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.planner.lawfile import PlanningLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.optimum import optimise
from dsmoe.planner.plan import Plan
from dsmoe.planner.shapes import KINDS, Family

SMOE_COLOURS = ("#c6dbef", "#8ab8dc", "#5a98cb", "#2f74b0", "#12508d", "#08306b")
POINTS = 60


def style(family: Family, families: Sequence[Family]) -> dict[str, Any]:
    """Colour and line of a family: dense black, SMoE from light to dark blue with experts, DS-MoE dashed red."""
    if family.kind == "dense":
        return {"color": KIND_COLOURS["dense"], "linewidth": 2.0}
    if family.kind == "dsmoe":
        return {"color": KIND_COLOURS["dsmoe"], "linewidth": 2.0, "linestyle": "--"}
    counts = sorted({other.num_experts for other in families if other.kind == "smoe"})
    place = counts.index(family.num_experts) / max(1, len(counts) - 1)
    return {"color": SMOE_COLOURS[1 + round(place * (len(SMOE_COLOURS) - 2))], "linewidth": 1.6}


def label(family: Family, law: PlanningLaw) -> str:
    """Name of a family; an assumed DS-MoE says so."""
    if family.kind != "dsmoe" or law.fit.term.fitted:
        return family.name
    return f"{family.name} (assumed, eta {law.fit.eta(family):g})"


def memory_curve(
    family: Family, limits: Limits, law: PlanningLaw, gigabytes: Sequence[float]
) -> list[dict[str, float]]:
    """Best loss of a family at each memory limit, up to the memory that its optimum without that limit wants."""
    points = []
    for size in gigabytes:
        optimum = optimise(family, law.fit.sized_loss(family), replace(limits, memory_bytes=size * 1e9))
        if optimum is None or optimum.hidden_size < family.step:
            continue
        used = limits.serving.total_bytes(family, optimum.hidden_size) / 1e9
        points.append({"memory_gb": used, "loss": optimum.loss})
        if "memory" not in optimum.binding:
            break
    return points


def geometric(low: float, high: float, count: int | None = None) -> list[float]:
    """`count` values (default: POINTS) from low to high at equal ratios."""
    count = count or POINTS
    return [low * (high / low) ** (index / (count - 1)) for index in range(count)]


def draw_memory(
    axes: Any,
    families: Sequence[Family],
    limits: Limits,
    law: PlanningLaw,
    ends: tuple[float, float],
) -> dict[str, list[dict[str, float]]]:
    """Loss against memory (GB), a line per family; a dot ends the line where more memory stops helping."""
    curves = {}
    for family in families:
        points = memory_curve(family, limits, law, geometric(*ends))
        curves[family.name] = points
        if not points:
            continue
        x, y = [point["memory_gb"] for point in points], [point["loss"] for point in points]
        axes.plot(x, y, label=label(family, law), **style(family, families))
        if x[-1] < ends[1] * (1 - 1e-6):
            axes.plot(x[-1], y[-1], "o", color=style(family, families)["color"], markersize=4)
    axes.set_xscale("log")
    axes.set_xlim(*ends)
    axes.set_xlabel("memory (GB): weights of all experts and KV cache")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    plain_ticks(axes.xaxis, ends)
    return curves


def plain_ticks(axis: Any, ends: tuple[float, float]) -> None:
    """Ticks of a log axis at 1, 2, 5 times powers of ten in plain digits."""
    first, last = math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1]))
    values = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    shown = [value for value in values if ends[0] <= value <= ends[1]]
    if len(shown) > 9:
        shown = [value for value in shown if math.log10(value) % 1 < 1e-9]
    axis.set_ticks(shown, [f"{value:g}" for value in shown])
    axis.set_ticks([], minor=True)


def plot_plan(plan: Plan, path: str | Path) -> None:
    """Loss against memory by number of experts under the plan's other limits, the best row marked.

    With a fixed total there is nothing to sweep and the rows are drawn as points.
    """
    limits = plan.limits
    families = sorted((row.family for row in plan.rows), key=lambda f: (KINDS.index(f.kind), f.num_experts))
    figure, axes = pyplot().subplots(figsize=(8.2, 5.0))
    used = [row.fields["memory_bytes"] / 1e9 for row in plan.rows]
    wanted = limits.memory_bytes / 1e9 if limits.memory_bytes else 1.5 * max(used)
    if limits.total_params is None:
        draw_memory(axes, families, limits, plan.law, (min(wanted, *used) / 6, 3 * wanted))
    else:
        for row, memory in zip(plan.rows, used):
            colour = style(row.family, families)["color"]
            axes.plot(memory, row.real.loss, "o", color=colour, label=label(row.family, plan.law))
        axes.set_xlabel("memory (GB): weights of all experts and KV cache")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
    best = plan.rows[0]
    axes.plot(used[0], best.real.loss, "*", markersize=17, color="#edae49", markeredgecolor="black", zorder=5,
              label=f"best: {best.family.name}, {best.real.loss:.3f}")  # fmt: skip
    if limits.memory_bytes:
        axes.axvline(wanted, color="#888888", linestyle=":", label=f"limit {wanted:g} GB")
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, max(row.real.loss for row in plan.rows) + 0.35))
    axes.set_ylabel("loss (nats per token)")
    budget = f", {limits.flops:.3g} FLOPs" if limits.flops else ""
    budget += f", {limits.training_flops:.3g} FLOPs of training" if limits.training_flops else ""
    axes.set_title(f"Loss against memory{budget} (law: {plan.law.name})", fontsize=10)
    axes.legend(fontsize=8)
    save_figure(figure, path)
