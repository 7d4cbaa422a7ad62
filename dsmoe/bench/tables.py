"""The training benchmark as a table for people, and its growth curves as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe.figures import pyplot, save_figure

# the claims of the training engine: largest ratios, without and with recompute
GOALS = {
    False: {"time": 1.05, "saved": 0.60},
    True: {"time": 1.25, "saved": 0.15},
}
GOAL_MODEL = 0.97
GOAL_MOA = 1.05


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def result_table(results: Mapping[str, Any]) -> str:
    """Every result of a run as Markdown tables; a star marks a ratio that misses its goal.

    Args:
        results: of `dsmoe.bench.command.measure`.
    """
    lines = [
        "Ratios are medians over interleaved rounds (quartiles in brackets). Dense: nn.Linear SwiGLU of equal width.",
        f"float32 matrix products in oneDNN's {results['float32_matmul']} mode on both sides; gated activation: "
        f"{results['kernel']}.",
        "",
        "| layer | dtype | threads | recompute | time / dense | saved / dense | saved, peak MiB (dense) "
        "| % of GEMM ceiling | x transformers (best) | saved / transformers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_layer_line(row) for row in results["layers"]]
    lines += ["", "| mixture of heads | threads | time / GQA | saved / GQA |", "|---|---|---|---|"]
    for row in results["attention"]:
        low, high = row["time_ratio_to_gqa_quartiles"]
        star = _star(row["time_ratio_to_gqa"] > GOAL_MOA)
        lines.append(
            f"| {row['heads']} heads, {row['dtype']} | {row['threads']} "
            f"| {row['time_ratio_to_gqa']:.3f}{star} [{low:.2f} {high:.2f}] | {row['saved_ratio_to_gqa']:.2f} |"
        )
    lines += ["", "| whole model | threads | tokens/s / dense | peak MiB (dense) |", "|---|---|---|---|"]
    for row in results["models"]:
        low, high = row["tokens_per_second_ratio_to_dense_quartiles"]
        star = _star(row["tokens_per_second_ratio_to_dense"] < GOAL_MODEL)
        lines.append(
            f"| {row['num_params'] / 1e6:.1f}M, {row['dtype']} | {row['threads']} "
            f"| {row['tokens_per_second_ratio_to_dense']:.3f}{star} [{low:.2f} {high:.2f}] "
            f"| {_mebibytes(row['peak_bytes'])} ({_mebibytes(row['peak_bytes_dense'])}) |"
        )
    notes = {
        f"transformers {peer}: {note}"
        for row in results["layers"]
        for peer, note in row["transformers_notes"].items()
    }
    return "\n".join([*lines, "", *sorted(notes)]).rstrip()


def _layer_line(row: Mapping[str, Any]) -> str:
    goals = GOALS[row["recompute"]]
    low, high = row["time_ratio_to_dense_quartiles"]
    peer = row["best_transformers_implementation"]
    return (
        f"| {row['case']} | {row['dtype']} | {row['threads']} | {'yes' if row['recompute'] else 'no'} "
        f"| {row['time_ratio_to_dense']:.3f}{_star(row['time_ratio_to_dense'] > goals['time'])} [{low:.2f} {high:.2f}] "
        f"| {row['saved_ratio_to_dense']:.3f}{_star(row['saved_ratio_to_dense'] > goals['saved'])} "
        f"| {_mebibytes(row['saved_bytes'])}, {_mebibytes(row['peak_bytes'])} "
        f"({_mebibytes(row['saved_bytes_dense'])}, {_mebibytes(row['peak_bytes_dense'])}) "
        f"| {100 * row['share_of_gemm_ceiling']:.0f} "
        f"| {_number(row['speedup_over_transformers'])}{f' ({peer})' if peer else ''} "
        f"| {_number(row['saved_ratio_to_transformers'], '{:.3f}')} |"
    )


def _star(missed: bool) -> str:
    return "*" if missed else ""


def growth_plot(growth: Mapping[str, Any], path: str | Path) -> None:
    """Time of a step relative to the first point, ours and the dense twin's, against each quantity that grows.

    Args:
        growth: of `dsmoe.bench.training.measure_growth`.
        path: the PNG.
    """
    plt = pyplot()
    figure, panels = plt.subplots(1, len(growth), figsize=(3.4 * len(growth), 3.4))
    for axes, (quantity, points) in zip(panels, growth.items()):
        values = [point["value"] for point in points]
        first = points[0]["milliseconds_dense"]
        for key, label, style in (("milliseconds", "ours", "o-"), ("milliseconds_dense", "dense", "s--")):
            axes.plot(values, [point[key] / first for point in points], style, label=label, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(value) for value in values])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(quantity)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("time of a step / dense at the first point")
    panels[0].legend(fontsize=9)
    figure.tight_layout()
    save_figure(figure, path)
