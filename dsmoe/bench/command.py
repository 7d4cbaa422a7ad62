"""The command line of the training benchmark."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsmoe.bench.contestants import DTYPES
from dsmoe.bench.output import (
    add_plan_arguments,
    benchmark_parser,
    checked_rounds,
    command_for_threads,
    give,
    reading,
    results_of,
)
from dsmoe.bench.tables import growth_plot, result_table
from dsmoe.bench.timing import checked_threads, threads_in_use
from dsmoe.bench.training import (
    FULL,
    QUICK,
    Plan,
    measure_attention,
    measure_growth,
    measure_layer,
    measure_model,
)
from dsmoe.environment import describe
from dsmoe.errors import run_reporting_errors
from dsmoe.model.kernels import selected_kernel
from dsmoe.trainer.matmul import float32_matmul

EXAMPLES = """examples:
  python eval/bench_training.py
  python eval/bench_training.py --json results.json --plot growth.png
  python eval/bench_training.py --threads 1 --json -
  python eval/bench_training.py --quick
  python eval/bench_training.py --threads 1 --record eval/records/training-speed
Times depend on what else the machine does: run it on a quiet one. Verdicts use ratios alone.
"""


def measure(plan: Plan, threads: Sequence[int], advance: Callable[[str], Any]) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        plan: what is measured.
        threads: numbers of threads; peers and growth are measured with the first alone.
        advance: called with the name of the case after each timed step.

    Returns:
        The results as written by `--json`.
    """
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "float32_matmul": None,
        "kernel": selected_kernel(),
        "rounds": plan.rounds,
        "tokens": plan.tokens,
        "layers": [],
        "attention": [],
        "models": [],
    }
    with float32_matmul("auto") as results["float32_matmul"]:
        for count in threads:
            with threads_in_use(count) as cores:
                where = {"threads": count, "cores": cores}
                _measure_on(plan, where, count == threads[0], results, advance)
    first = results["models"][0]
    name = "tokens_per_second_ratio_to_dense"
    results["model"] = {name: first[name], "dtype": first["dtype"], "threads": first["threads"]}
    return {**results, **describe()}


def _measure_on(
    plan: Plan, where: dict[str, Any], first: bool, results: dict[str, Any], advance: Callable[[str], Any]
) -> None:
    shown = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    for sizes in plan.layers:
        for dtype in DTYPES:
            rows = measure_layer(sizes, dtype, plan, peers=first, advance=lambda: advance(f"layers, {shown}"))
            results["layers"] += [{**row, **where} for row in rows]
    for dtype in DTYPES:
        row = measure_attention(dtype, plan, lambda: advance(f"attention, {shown}"))
        results["attention"].append({**row, **where})
    for dtype in DTYPES:
        row = measure_model(dtype, plan, lambda: advance(f"whole model, {shown}"))
        results["models"].append({**row, **where})
    if first:
        results["growth"] = measure_growth(plan, lambda: advance(f"growth, {shown}"))


def run(args: argparse.Namespace) -> None:
    """Measure (or read earlier results), print the table or write JSON, plot and record."""
    results = results_of(args, partial(_measured, args))
    with reading(args):
        table, command = result_table(results), command_for_threads(args, "bench_training.py", results)
        draw = partial(growth_plot, results["growth"])
    give(
        args, results, table, "Dense training beside the dense twin and transformers' experts", command,
        {"growth.png": draw},
    )  # fmt: skip


def _measured(args: argparse.Namespace, advance: Callable[[str], Any]) -> dict[str, Any]:
    plan = QUICK if args.quick else FULL
    plan = replace(plan, rounds=checked_rounds(args) or plan.rounds)
    return measure(plan, checked_threads(args.threads), advance)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run.

    Args:
        argv: the command line; None: that of the process.
    """
    parser = benchmark_parser(
        "bench_training.py",
        (
            "Time and memory of dense training: expert layers, mixtures of attention heads and whole models, "
            "against dense ones and transformers' experts, interleaved, on pinned threads."
        ),
        EXAMPLES,
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw how the cost grows")
    add_plan_arguments(parser, "15")
    return run_reporting_errors(lambda: run(parser.parse_args(argv)))
