"""The figures of the page about a law, each with the numbers behind it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.planner.lawfile import PlanningLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.memory import Serving
from dsmoe.planner.optimum import minimise, optimise
from dsmoe.planner.plan import candidate_families
from dsmoe.planner.plots import draw_memory, geometric, label, plain_ticks, style
from dsmoe.planner.shapes import Family

CONTEXT = 16_384
MEMORIES = {24: "RTX 4090", 80: "H100", 640: "8 x H100"}
ETAS = (1.0, 0.9, 0.8, 0.7)
MAP = {"memory_gb": (8, 200), "inference_tokens": (1e11, 3e13)}
MAP_ETAS = (1.0, 0.9, 0.8)
MAP_POINTS = 20


def window(flops: float) -> float:
    """Factor on memory and inference tokens that keeps a small budget's figures where something happens; 1 at 1e23."""
    return min(1.0, (flops / 1e23) ** 0.5)


def figure_memory(law: PlanningLaw, budgets: Sequence[float], path: Path) -> dict[str, Any]:
    """(a) Loss against memory for fixed training budgets, by number of experts; the best of each memory marked."""
    figure, panels = pyplot().subplots(1, len(budgets), figsize=(5.2 * len(budgets), 5.0), squeeze=False)
    families, found = candidate_families(law), {}
    scale = window(max(budgets))
    ends = (5 * scale, 1500 * scale)
    for flops, axes in zip(budgets, panels[0]):
        limits = Limits(flops=flops, serving=Serving(CONTEXT))
        curves = draw_memory(axes, families, limits, law, ends)
        if not any(curves.values()):
            raise UserError(
                f"{flops:.3g} training FLOPs: no model with {CONTEXT:,} tokens of KV cache fits into {ends[0]:.3g} to "
                f"{ends[1]:.3g} GB; give larger budgets"
            )
        best = []
        for memory, name in MEMORIES.items():
            row = _best(
                families, Limits(flops=flops, memory_bytes=memory * 1e9, serving=Serving(CONTEXT)), law
            )
            if row is None:
                continue
            best.append({"memory_gb": memory, **row})
            axes.plot(row["memory_gb_used"], row["loss"], "*", markersize=14, color="#edae49", markeredgecolor="black",
                      zorder=5)  # fmt: skip
            if ends[0] < memory < ends[1]:
                axes.axvline(memory, color="#999999", linestyle=":", linewidth=1)
                axes.text(memory * 0.97, 0.99, name, rotation=90, ha="right", va="top", fontsize=7.5,
                          transform=axes.get_xaxis_transform())  # fmt: skip
        floor = min(point["loss"] for points in curves.values() for point in points)
        axes.set_ylim(floor - 0.02, max(points[0]["loss"] for points in curves.values() if points) + 0.06)
        axes.set_title(f"{flops:g} training FLOPs", fontsize=10)
        found[f"{flops:g}"] = {"curves": curves, "best": best}
    panels[0][0].set_ylabel("loss (nats per token)")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles, names, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncols=len(names)
    )
    save_figure(figure, path)
    return found


def _best(families: Sequence[Family], limits: Limits, law: PlanningLaw) -> dict[str, Any] | None:
    """The family of least loss over real hidden sizes, and those that tie with it; None: none keeps the limits."""
    sized = [(family, optimise(family, law.fit.sized_loss(family), limits)) for family in families]
    possible = [(optimum.loss, family, optimum) for family, optimum in sized if optimum is not None]
    if not possible:
        return None
    loss, family, optimum = min(possible, key=lambda entry: entry[0])
    ties = [other.name for value, other, _ in possible if other != family and value - loss <= law.tie_band]
    return {
        "best": family.name,
        "kind": family.kind,
        "loss": loss,
        "ties": ties,
        "extrapolated": bool(law.beyond_range(family, optimum.hidden_size, optimum.tokens)),
        "memory_gb_used": limits.serving.total_bytes(family, optimum.hidden_size) / 1e9,
    }


def figure_isoflop(law: PlanningLaw, budgets: Sequence[float], path: Path) -> dict[str, Any]:
    """(b) Loss against active parameters at fixed training budgets, dense and an SMoE, optima marked."""
    figure, axes = pyplot().subplots(figsize=(8.2, 5.2))
    known = law.known_experts
    counts = [count for count in (1, 8) if known is None or count in known]
    colours = pyplot().get_cmap("viridis")(
        [0.9 * rank / max(1, len(budgets) - 1) for rank in range(len(budgets))]
    )
    found = []
    for flops, colour in zip(budgets, colours):
        for count, line in zip(counts, ("-", "--")):
            reduced = law.fit.law.at(count)

            def loss(log_params: float, flops: float = flops, reduced: Any = reduced) -> float:
                num_params = 10**log_params
                return reduced.loss(num_params, flops / 6 / num_params)

            best = minimise(loss, 5.0, 14.0)
            x = [10 ** (best - 1.1 + 2.2 * index / 80) for index in range(81)]
            y = [loss(best - 1.1 + 2.2 * index / 80) for index in range(81)]
            name = "dense" if count == 1 else f"SMoE E={count}"
            axes.plot(x, y, line, color=colour, linewidth=1.7, label=f"{flops:g} FLOPs, {name}")
            axes.plot(10**best, loss(best), "o", color=colour, markersize=6, zorder=4)
            found.append({"flops": flops, "num_experts": count, "num_params_active": 10**best,
                          "tokens": flops / 6 / 10**best, "loss": loss(best)})  # fmt: skip
    if "num_params_active" in law.fitted_range:
        edge = law.fitted_range["num_params_active"][1]
        axes.axvspan(edge, axes.get_xlim()[1], color="#999999", alpha=0.15, linewidth=0)
        axes.text(
            0.99, 0.98, "grey: extrapolated", va="top", ha="right", fontsize=9, transform=axes.transAxes
        )
    axes.set_xscale("log")
    axes.set_xlim(
        min(entry["num_params_active"] for entry in found) / 10,
        max(e["num_params_active"] for e in found) * 8,
    )
    axes.set_xlabel("active parameters")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)
    return {"optima": found}


def figure_inference(law: PlanningLaw, flops: float, memory_gb: float, path: Path) -> dict[str, Any]:
    """(c) One budget for training and inference: losses against inference tokens, and who wins at each memory."""
    laws = [law] if law.fit.term.fitted else [law.with_eta(eta) for eta in MAP_ETAS]
    rows = (2 + len(laws)) // 2
    figure, grid = pyplot().subplots(rows, 2, figsize=(13.5, 5.2 * rows), squeeze=False)
    figure.subplots_adjust(hspace=0.28)
    panels = grid.flatten()
    low, high = MAP["inference_tokens"]
    ends = (low * window(flops), high * window(flops))
    lines = _draw_demand(panels[0], law, flops, memory_gb, ends)
    maps = [
        {
            "eta": other.fit.eta(candidate_families(other)[-1]),
            "cells": _draw_winners(axes, other, flops, ends),
        }
        for axes, other in zip(panels[1:], laws)
    ]
    save_figure(figure, path)
    return {"flops": flops, "memory_gb": memory_gb, "curves": lines, "maps": maps}


def _loss_at(family: Family, law: PlanningLaw, flops: float, memory_gb: float, demand: float) -> float | None:
    limits = Limits(
        flops=flops, memory_bytes=memory_gb * 1e9, inference_tokens=demand, serving=Serving(CONTEXT)
    )
    optimum = optimise(family, law.fit.sized_loss(family), limits)
    return None if optimum is None else optimum.loss


def _draw_demand(
    axes: Any, law: PlanningLaw, flops: float, memory_gb: float, ends: tuple[float, float]
) -> dict[str, Any]:
    families, demands, lines = candidate_families(law), geometric(*ends, 40), {}
    for family in families:
        term = law.fit.term
        etas = ETAS if family.kind == "dsmoe" and not term.fitted else (term.eta,)
        for rank, eta in enumerate(etas):
            used = law.with_eta(eta) if family.kind == "dsmoe" and not term.fitted else law
            losses = [_loss_at(family, used, flops, memory_gb, demand) for demand in demands]
            name = label(family, used)
            shown = {**style(family, families), "alpha": 1 - 0.2 * rank}
            known = [(demand, loss) for demand, loss in zip(demands, losses) if loss is not None]
            x, y = [demand for demand, _ in known], [loss for _, loss in known]
            if known:
                axes.plot(x, y, label=name, **shown)
            lines[name] = {"inference_tokens": x, "loss": y}
    axes.set_xscale("log")
    axes.set_xlabel("inference tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"{flops:g} FLOPs for training and inference together, {memory_gb:.3g} GB", fontsize=10)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    axes.legend(fontsize=8)
    return lines


def _draw_winners(
    axes: Any, law: PlanningLaw, flops: float, ends: tuple[float, float]
) -> list[dict[str, Any]]:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    families = candidate_families(law)
    low, high = (size * window(flops) for size in MAP["memory_gb"])
    memories, demands = geometric(low, high, MAP_POINTS), geometric(*ends, MAP_POINTS)
    kinds = ("dense", "smoe", "dsmoe")
    cells, found = [], []
    for memory in memories:
        row = []
        for demand in demands:
            limits = Limits(
                flops=flops, memory_bytes=memory * 1e9, inference_tokens=demand, serving=Serving(CONTEXT)
            )
            best = _best(families, limits, law)
            if best is None:
                row.append(math.nan)
                continue
            kept = {name: best[name] for name in ("best", "kind", "loss", "ties")}
            found.append({"memory_gb": memory, "inference_tokens": demand, **kept})
            row.append(kinds.index(best["kind"]))
            if best["kind"] != "dsmoe" and any(name.startswith("DS-MoE") for name in best["ties"]):
                axes.plot(demand, memory, ".", color=KIND_COLOURS["dsmoe"], markersize=5)
            if best["kind"] == "dsmoe" and best["ties"]:
                axes.plot(demand, memory, ".", color="white", markersize=5)
        cells.append(row)
    colours = ("#9a9a9a", "#8ab8dc", KIND_COLOURS["dsmoe"])
    axes.pcolormesh(
        demands, memories, cells, cmap=ListedColormap(colours), vmin=-0.5, vmax=2.5, shading="nearest"
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, (low, high))
    axes.set_xlabel("inference tokens")
    axes.set_ylabel("memory (GB)")
    axes.set_title("lowest loss; red dots: DS-MoE ties; white dots: it leads, but something ties", fontsize=9)
    assumed = "" if law.fit.term.fitted else f" (assumed, eta {law.fit.term.eta:g})"
    names = ("dense", "SMoE, best number of experts", f"DS-MoE{assumed}")
    axes.legend(
        handles=[Patch(color=c, label=n) for c, n in zip(colours, names)], fontsize=8, loc="upper right"
    )
    return found
