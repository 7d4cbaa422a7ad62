"""The plots of a sparsity sweep, as PNG."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.figures import pyplot, save_figure

Row = Mapping[str, Any]
STYLES = {
    "uniform_k": ("uniform K", "#1f3b73", "s"),
    "global_threshold": ("global threshold", "#edae49", "^"),
    "global_top_p": ("global top-p", "#8aa1c9", "v"),
    "per_layer_k": ("K per layer", "#66a182", "s"),
    "per_layer_threshold": ("threshold per layer", "#d1495b", "o"),
    "per_expert_threshold": ("threshold per expert", "#999999", "d"),
    "top_p": ("top-p per layer", "#b48ead", "x"),
}


def frontier_plot(results: Row, path: Path) -> None:
    """Loss increase against active parameters, and against the share of experts that is deactivated (log scale)."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(12.5, 4.8))
    names = list(dict.fromkeys((row["family"], row["score"]) for row in results["rows"]))
    for family, score in names:
        rows = sorted(
            (row for row in results["rows"] if (row["family"], row["score"]) == (family, score)),
            key=lambda row: row["num_params_active"],
        )
        label, colour, marker = STYLES[family]
        line = "--" if score == "gate_norm" else "-"
        label += ", gate x norm" if score == "gate_norm" else ""
        left.errorbar(
            [row["num_params_active"] / 1e6 for row in rows], [row["loss"] for row in rows],
            yerr=[row["standard_error"] for row in rows], fmt=line, marker=marker, color=colour, label=label, capsize=2,
        )  # fmt: skip
        right.plot(
            [1 - row["share"] for row in rows],
            [max(row["loss_increase"], 1e-5) for row in rows],
            line, marker=marker, color=colour, label=label,
        )  # fmt: skip
    left.axhline(
        results["reference"]["loss"], color="#333333", linestyle=":", label="the checkpoint as it is"
    )
    left.set_xlabel("active parameters (millions, embeddings included)")
    left.set_ylabel("held-out loss (nats per token)")
    right.set_xlabel("share of experts deactivated")
    right.set_ylabel("loss increase (nats per token)")
    right.set_yscale("log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save_figure(figure, path)


def layers_plot(results: Row, path: Path) -> None:
    """Active experts per layer near a third active: mean, and median to 95th percentile over tokens."""
    parts = results["layers_at_a_third"] or {}
    figure, axes = pyplot().subplots(
        1, max(1, len(parts)), figsize=(6 * max(1, len(parts)), 4), squeeze=False
    )
    for axis, (part, rows) in zip(axes[0], parts.items()):
        layers = np.arange(len(rows["mean"]))
        axis.barh(layers, rows["mean"], color="#edae49", label="mean")
        axis.hlines(layers, rows["p50"], rows["p95"], color="#333333", label="p50 to p95")
        experts = results["model"]["num_experts" if part == "mlp" else "num_attention_experts"]
        axis.set_xlabel(f"active {'MLP' if part == 'mlp' else part} experts of {experts} per token")
        axis.set_ylabel("layer")
        axis.set_yticks(layers)
        axis.invert_yaxis()
        axis.legend(fontsize=8)
    save_figure(figure, path)


def union_plot(results: Row, path: Path) -> None:
    """Distinct experts in chunks of tokens, per layer, near a third active: what tokens that run together read."""
    parts = results["layers_at_a_third"] or {}
    figure, axes = pyplot().subplots(
        1, max(1, len(parts)), figsize=(6 * max(1, len(parts)), 4), squeeze=False
    )
    for axis, (part, rows) in zip(axes[0], parts.items()):
        experts = results["model"]["num_experts" if part == "mlp" else "num_attention_experts"]
        width = 0.8 / max(1, len(rows["union"]))
        for place, (chunk, sizes) in enumerate(rows["union"].items()):
            layers = np.arange(len(sizes)) + (place - (len(rows["union"]) - 1) / 2) * width
            axis.bar(
                layers, np.array(sizes) / experts, width, label=f"{chunk} token{'s' if chunk != '1' else ''}"
            )
        axis.set_xlabel("layer")
        axis.set_ylabel(f"share of the {'MLP' if part == 'mlp' else part} experts that any token keeps")
        axis.set_ylim(0, 1)
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3, axis="y")
    save_figure(figure, path)
