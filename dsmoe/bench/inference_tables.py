"""The inference benchmark as a table for people."""

from collections.abc import Mapping
from typing import Any

# largest active bytes of a decoding step at which fixed costs are allowed to show
_SMALL_BYTES = 5_000_000
_MODEL_GOAL = 1.8


def goal(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The largest ratio and the smallest speedup over transformers that are claimed for a row, where there is a claim.

    The ratio is to all experts in decoding, to the dense layer in prefill. A threshold has the same claims as top-K,
    10% apart.
    """
    if row["dtype"] == "int8":
        return None
    bf16 = row["dtype"] == "bf16"
    slack = 1.1 if row["policy"] == "threshold" else 1.0
    share = row["k"] / row["num_experts"]
    if row["phase"] == "prefill":
        factor = 2.0 if bf16 and row["k"] == 4 else 1.5
        return slack * factor * share, 2.2 / slack
    if row["k"] != 4:
        return None
    if row["batch"] == 1:
        factor = 1.15 if row["active_bytes"] >= _SMALL_BYTES else 1.4
        return slack * factor * share, (8 if bf16 else 5) / slack
    return slack * 0.66, (5 if bf16 else 2.5) / slack


def result_table(results: Mapping[str, Any]) -> str:
    """Every layer of a run as Markdown tables; a star marks what misses its goal.

    Args:
        results: of `dsmoe.bench.inference_command.measure`.
    """
    lines = [
        "Ratios are medians over interleaved rounds; in decoding a round is a way through "
        f"{results['decode_layers']} layers of different weights, divided by their number. All: our path for all "
        "experts; dense: nn.Linear SwiGLU of equal width. Ideal: share of the weights that are read (decode) or of the "
        "arithmetic (prefill). Reading: of the kept experts' weights, just as cold, without any arithmetic: the least "
        "time there is.",
        f"float32 matrix products in oneDNN's {results['float32_matmul']} mode on all sides; experts: "
        f"{results['kernel'] or 'torch operations'}.",
        "",
        "| layer | phase | batch | policy | threads | ideal | time / all | time / dense | time / top-K "
        "| time / reading | x transformers (best) | % of ceiling (all experts) | us |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines = [*lines, *(_line(row) for row in results["layers"])] if results["layers"] else lines[:2]
    notes = {
        f"transformers {peer}: {note}"
        for row in results["layers"]
        for peer, note in row["transformers_notes"].items()
    }
    lines += ["", *sorted(notes)]
    if results["model"]:
        lines += ["", *_model_lines(results["model"])]
    return "\n".join(lines).strip()


def _model_lines(model: Mapping[str, Any]) -> list[str]:
    """The whole model; milliseconds of a token by part are of ours / of the dense twin."""
    lines = [
        f"Whole model: {model['num_params_total'] / 1e6:.1f}M parameters, {model['k']} of {model['num_experts']} experts "
        f"({100 * model['mlp_share_active']:.0f}% of the MLP), batch 1, {model['prompt_tokens']} tokens in the cache. "
        "Dense twin in the same loop; transformers: its own generate, with our model.",
        "",
        "| dtype | threads | tok/s | dense tok/s | ratio (ideal) | x transformers | % of read bandwidth (dense) "
        "| ms by part: ours / dense | weights + cache + growth MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in model["rows"]:
        own, dense = row["own"], row["dense"]
        parts = ", ".join(
            f"{part.replace('_', ' ')} {value:.2f} / {dense['milliseconds_by_part'][part]:.2f}"
            for part, value in own["milliseconds_by_part"].items()
        )
        missed = (
            "*" if row["dtype"] != "int8" and row["tokens_per_second_ratio_to_dense"] < _MODEL_GOAL else ""
        )
        speedup, growth = row["speedup_over_transformers"], own["memory_growth_bytes"]
        lines.append(
            f"| {row['dtype']} | {row['threads']} | {own['tokens_per_second']:.1f} | {dense['tokens_per_second']:.1f} "
            f"| {row['tokens_per_second_ratio_to_dense']:.2f}{missed} ({row['ideal_ratio_to_dense']:.2f}) "
            f"| {'-' if speedup is None else f'{speedup:.1f}'} "
            f"| {100 * own['share_of_read_bandwidth']:.0f} ({100 * dense['share_of_read_bandwidth']:.0f}) | {parts} "
            f"| {own['weight_bytes'] / 1e6:.0f} + {own['cache_bytes'] / 1e6:.0f} "
            f"+ {'?' if growth is None else f'{growth / 1e6:.0f}'} |"
        )
    for row in model["rows"]:
        steps = ", ".join(
            f"K{step['k']} B{step['batch']} context {step['context']}: {1e3 * step['seconds_per_step']:.1f}"
            for step in row["growth"]
        )
        if steps:
            lines += ["", f"Milliseconds of a step, {row['dtype']}, {row['threads']} threads: {steps}."]
    return lines


def _line(row: Mapping[str, Any]) -> str:
    prefill = row["phase"] == "prefill"
    ceiling = "gemm_ceiling" if prefill else "read_bandwidth"
    claimed = goal(row)
    ratio = row["time_ratio_to_dense" if prefill else "time_ratio_to_all_experts"]
    missed = "*" if claimed and ratio > claimed[0] else ""
    speedup = row["speedup_over_transformers"]
    slow = "*" if claimed and speedup is not None and speedup < claimed[1] else ""
    peer = row["best_transformers_implementation"]
    seconds, reading = sorted(row["seconds"][row["policy"]]), row.get("time_ratio_to_reading")
    return (
        f"| {row['case']} {row['dtype']} | {row['phase']} | {row['tokens']} | {row['policy']} | {row['threads']} "
        f"| {row['ideal_ratio']:.3f} | {row['time_ratio_to_all_experts']:.3f}{'' if prefill else missed} "
        f"| {row['time_ratio_to_dense']:.3f}{missed if prefill else ''} | {row['time_ratio_to_top_k']:.2f} "
        f"| {'-' if reading is None else f'{reading:.2f}'} "
        f"| {'-' if speedup is None else f'{speedup:.1f}{slow} ({peer})'} "
        f"| {100 * row[f'share_of_{ceiling}']:.0f} ({100 * row[f'all_experts_share_of_{ceiling}']:.0f}) "
        f"| {1e6 * seconds[len(seconds) // 2]:.0f} |"
    )
