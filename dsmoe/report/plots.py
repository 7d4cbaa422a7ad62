"""The plots of a comparison, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe.figures import pyplot, save_figure

COLOURS = {"dense": "#1f3b73", "dense-active": "#8aa1c9", "dsmoe": "#d1495b", "dsmoe-sparse": "#edae49"}


def loss_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Training loss (smoothed) and validation loss against tokens, one colour per run.

    Args:
        logs: name to the lines of its log.jsonl.
        path: the PNG.
    """
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 4.2))
    for name, lines in logs.items():
        colour = COLOURS.get(name)
        train = [(line["tokens"], line["lm_loss"]) for line in lines if "lm_loss" in line]
        tokens, losses = np.array(train).T
        for axes, start in ((left, 0), (right, len(tokens) // 2)):
            axes.plot(
                tokens[start:] / 1e6, _smoothed(losses)[start:], color=colour, label=name, linewidth=1.6
            )
        for key, marker in (("validation_loss", "o"), ("validation_loss_sparse", "x")):
            points = [(line["tokens"] / 1e6, line[key]) for line in lines if key in line]
            if points:
                right.plot(*np.array(points)[-3:].T, marker, color=colour, markersize=6)
    left.set_title("training loss")
    right.set_title("second half, with validation (o: all experts, x: sparse)")
    for axes in (left, right):
        axes.set_xlabel("tokens (millions)")
        axes.grid(alpha=0.3)
    left.set_ylabel("nats per token")
    left.legend()
    save_figure(figure, path)


def _smoothed(values: np.ndarray, weight: float = 0.8) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    total, norm, out = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return np.array(out)


def quality_against_active(
    models: Sequence[Mapping[str, Any]],
    frontiers: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | Path,
) -> None:
    """Validation loss against active parameters: the models as points, one DS-MoE at many policies as lines.

    Args:
        models: rows of results.json.
        frontiers: name of a rule to points of `dsmoe.sparsify.frontier`.
        path: the PNG.
    """
    figure, axes = pyplot().subplots(figsize=(7.5, 4.8))
    styles = ("-", "--", ":")
    for (name, points), style in zip(frontiers.items(), styles):
        ordered = sorted(points, key=lambda point: point["num_params_active"])
        axes.plot(
            [point["num_params_active"] / 1e6 for point in ordered],
            [point["loss"] for point in ordered],
            style, color="#888888", marker=".", label=f"the DS-MoE, {name}",
        )  # fmt: skip
    shown = sorted(
        (model for model in models if model.get("validation_loss") is not None),
        key=lambda model: (model["num_params_active"], -model["validation_loss"]),
    )
    right_half = max((model["num_params_active"] for model in shown), default=0) * 0.75
    for model in shown:
        x, y = model["num_params_active"] / 1e6, model["validation_loss"]
        axes.plot(x, y, "o", markersize=9, color=COLOURS.get(model["name"]), zorder=3)
        # labels point inwards; of neighbours, the higher point is labelled above and the lower below
        near = [
            other
            for other in shown
            if abs(other["num_params_active"] / 1e6 - x) < 0.1 * x and other is not model
        ]
        above = all(y >= other["validation_loss"] for other in near)
        left = model["num_params_active"] < right_half
        axes.annotate(
            f"{model['name']} {y:.3f}",
            (x, y),
            textcoords="offset points",
            xytext=(8 if left else -8, 12 if above else -18),
            ha="left" if left else "right",
            fontsize=9,
        )
    axes.set_xlabel("active parameters (millions, embeddings included)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save_figure(figure, path)


def expert_use(report: Mapping[str, Any], path: str | Path) -> None:
    """Active experts per layer (mean, with median to 95th percentile) and how often each expert is kept.

    Args:
        report: a sparsity.json.
        path: the PNG.
    """
    rows = [row["mlp"] for row in report["per_layer"]]
    layers = np.arange(len(rows))
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(11, 3.6 + 0.15 * len(rows)))
    left.barh(layers, [row["mean"] for row in rows], color=COLOURS["dsmoe-sparse"], label="mean")
    left.hlines(
        layers,
        [row["p50"] for row in rows],
        [row["p95"] for row in rows],
        color="#333333",
        label="p50 to p95",
    )
    left.axvline(report["num_experts"], color="#bbbbbb", linestyle=":")
    left.set_xlabel(f"active MLP experts of {report['num_experts']} per token")
    left.set_ylabel("layer")
    left.set_yticks(layers)
    left.invert_yaxis()
    left.legend(fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    shares = np.array([sorted(row["expert_share"], reverse=True) for row in rows])
    image = right.imshow(shares, aspect="auto", cmap="magma_r", vmin=0, vmax=max(0.01, float(shares.max())))
    right.set_xlabel("experts, most used first")
    right.set_yticks(layers)
    right.set_xticks(np.arange(0, shares.shape[1], max(1, shares.shape[1] // 8)))
    right.set_title("share of tokens that keep the expert", fontsize=10)
    figure.colorbar(image, ax=right)
    save_figure(figure, path)
