"""The command line of the inference benchmark."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dsmoe.bench.inference import FULL, QUICK, InferencePlan, measure_layer
from dsmoe.bench.inference_contestants import DTYPES
from dsmoe.bench.inference_model import measure_model, model_summary
from dsmoe.bench.inference_tables import result_table
from dsmoe.bench.output import (
    add_plan_arguments,
    benchmark_parser,
    checked_rounds,
    command_for_threads,
    give,
    reading,
    results_of,
)
from dsmoe.bench.timing import checked_threads, threads_in_use
from dsmoe.environment import describe
from dsmoe.errors import run_reporting_errors
from dsmoe.model.kernels import inference_kernel
from dsmoe.trainer.matmul import float32_matmul

PARTS = ("decode", "prefill", "model")
EXAMPLES = """examples:
  python eval/bench_inference.py
  python eval/bench_inference.py --json results.json
  python eval/bench_inference.py --only decode --threads 1 --json -
  python eval/bench_inference.py --only model --threads 1 --rounds 5
  python eval/bench_inference.py --record eval/records/inference-layers
  python eval/bench_inference.py --quick
Times depend on what else the machine does: run it on a quiet one. Verdicts use ratios alone.
"""


def measure(
    plan: InferencePlan, parts: Sequence[str], threads: Sequence[int], advance: Callable[[str], Any]
) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        plan: what is measured.
        parts: of PARTS.
        threads: numbers of threads.
        advance: called with the name of the case after each timed step.

    Returns:
        The results as written by `--json`.
    """
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "float32_matmul": None,
        "kernel": inference_kernel(),
        "decode_rounds": plan.decode_rounds,
        "decode_layers": plan.decode_layers,
        "prefill_rounds": plan.prefill_rounds,
        "layers": [],
        "model": None,
    }
    models = []
    with float32_matmul("auto") as results["float32_matmul"]:
        for count in threads:
            with threads_in_use(count) as cores:
                for sizes in plan.layers if set(parts) - {"model"} else ():
                    for dtype_name in DTYPES:
                        shown = f"d{sizes[0]} {dtype_name}, {count} thread{'s' if count > 1 else ''}"
                        rows = measure_layer(sizes, dtype_name, plan, parts, partial(advance, shown))
                        results["layers"] += [{**row, "threads": count, "cores": cores} for row in rows]
                for dtype_name in DTYPES if "model" in parts else ():
                    shown = f"model {dtype_name}, {count} thread{'s' if count > 1 else ''}"
                    row = measure_model(plan.model, dtype_name, partial(advance, shown))
                    models.append({**row, "threads": count, "cores": cores})
    if models:
        results["model"] = model_summary(plan.model, models)
    return {**results, **describe()}


def run(args: argparse.Namespace) -> None:
    """Measure (or read earlier results), print the table or JSON, write the record."""
    results = results_of(args, partial(_measured, args))
    with reading(args):
        table, command = result_table(results), command_for_threads(args, "bench_inference.py", results)
    give(
        args, results, table,
        "Inference of expert layers and a whole model: kept experts against all, dense and transformers", command,
    )  # fmt: skip


def _measured(args: argparse.Namespace, advance: Callable[[str], Any]) -> dict[str, Any]:
    plan = QUICK if args.quick else FULL
    rounds = checked_rounds(args)
    if rounds is not None:
        model = replace(plan.model, rounds=rounds, transformers_rounds=min(rounds, 4))
        plan = replace(plan, decode_rounds=rounds, prefill_rounds=rounds, model=model)
    return measure(plan, args.only or PARTS, checked_threads(args.threads), advance)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run.

    Args:
        argv: arguments; None: those of the process.
    """
    parser = benchmark_parser(
        "bench_inference.py",
        (
            "Time of expert layers in inference: kept experts (top-K and threshold) against all experts, a dense "
            "layer and transformers' experts, interleaved, on pinned threads, with cold weights in decoding. Then a "
            "whole model of 158M parameters: decoding with 8 of 32 experts against its dense twin in the same loop, "
            "and against transformers' generate."
        ),
        EXAMPLES,
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="of decode, prefill, model")
    add_plan_arguments(parser, "decode 30, prefill 15, model 12")
    return run_reporting_errors(lambda: run(parser.parse_args(argv)))
