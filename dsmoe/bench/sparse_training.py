"""Training with K of N experts kept: a layer's step beside the dense twin's, all experts and transformers' experts."""

import argparse
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe.bench.contestants import DTYPES, DenseSwiGLU, LayerStep, TransformersLayer, WideLayer
from dsmoe.bench.memory import saved_bytes
from dsmoe.bench.output import (
    add_plan_arguments,
    benchmark_parser,
    checked_rounds,
    command_for_threads,
    give,
    reading,
    results_of,
)
from dsmoe.bench.timing import checked_threads, interleaved_seconds, ratio, threads_in_use
from dsmoe.bench.training import case_name
from dsmoe.environment import describe
from dsmoe.errors import run_reporting_errors
from dsmoe.model.grouped import grouped_experts
from dsmoe.model.kernels import selected_kernel
from dsmoe.trainer.matmul import float32_matmul

EXAMPLES = """examples:
  python eval/bench_sparse_training.py --threads 1 --json -
  python eval/bench_sparse_training.py --quick
  python eval/bench_sparse_training.py --record eval/records/sparse-training
Times depend on what else the machine does: run it on a quiet one. Verdicts use ratios alone.
"""
PEERS = ("eager", "grouped_mm")  # batched_mm copies weights for every pair
_SLOW_ROUNDS = 2  # of grouped_mm, which takes several times as long as anything else here
_BATCHES = 24  # more than there are rounds
_BIAS = 0.3


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        rounds: timed rounds of each case.
        tokens: tokens of a step.
        cases: (hidden size, experts, hidden units of one expert) and K.
    """

    rounds: int
    tokens: int
    cases: tuple[tuple[tuple[int, int, int], int], ...]


FULL = Plan(
    rounds=15,
    tokens=2048,
    cases=tuple(
        (sizes, kept) for sizes in ((128, 32, 16), (512, 32, 64), (1024, 32, 128)) for kept in (4, 8, 11)
    ),
)
QUICK = Plan(rounds=2, tokens=64, cases=(((32, 4, 8), 2),))


class KeptLayer(nn.Module):
    """This project's sparse expert path, with gates and the kept experts given: [T, K] of one batch after the other."""

    gates: Tensor

    def __init__(self, hidden_size: int, num_experts: int, width: int, index_BTK: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, 2 * width, hidden_size) * hidden_size**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, width, hidden_size) * hidden_size**-0.5)
        shape = (*index_BTK.shape[:-1], num_experts)
        # no Parameter: what autograd keeps of it counts
        self.register_buffer("gates", torch.rand(shape[1:], requires_grad=True))
        masks_BTN = torch.zeros(shape, dtype=torch.bool).scatter(-1, index_BTK, True)
        self.turns = itertools.cycle([mask.clone() for mask in masks_BTN])  # what is kept is one batch's

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        return grouped_experts(x_TD, self.gates, next(self.turns), self.up, self.down, "swiglu")


def sparse_steps(
    sizes: tuple[int, int, int], num_kept: int, tokens: int, dtype: torch.dtype, peers: Sequence[str] = PEERS
) -> dict[str, LayerStep]:
    """Steps of "dense", "all" experts, the "kept" ones, and of implementations of transformers for the same kept ones.

    Args:
        sizes: hidden size, number of experts, hidden units of one expert.
        num_kept: K; other ones for each token, and in each step: a product of a shape that was not seen before can take
            longer than the rest of it, and in training each batch has other shapes.
        tokens: T.
        dtype: of autocast.
        peers: of transformers.

    Returns:
        Name to LayerStep; all share x and the gradient.
    """
    hidden_size, num_experts, width = sizes
    # some experts are wanted by more tokens than others
    index_BTK = (
        (torch.randn(_BATCHES, tokens, num_experts) + _BIAS * torch.randn(num_experts)).topk(num_kept).indices
    )
    layers: dict[str, nn.Module] = {
        "dense": DenseSwiGLU(hidden_size, num_experts * width),
        "all": WideLayer(*sizes, tokens, recompute=False),
        "kept": KeptLayer(*sizes, index_BTK),
    }
    layers |= {name: TransformersLayer(*sizes, index_BTK, name) for name in peers}
    x, gradient = torch.randn(tokens, hidden_size, requires_grad=True), torch.randn(tokens, hidden_size)
    return {name: LayerStep(layer, x, gradient, dtype) for name, layer in layers.items()}


def measure_case(
    sizes: tuple[int, int, int], num_kept: int, dtype_name: str, plan: Plan, advance: Callable[[], Any]
) -> dict[str, Any]:
    """One row.

    Args:
        sizes: hidden size, experts, hidden units of one expert.
        num_kept: K.
        dtype_name: key of DTYPES.
        plan: rounds and tokens.
        advance: called after each timed step.

    Returns:
        "case", "num_kept", "share" (K / N), "dtype"; "time_ratio_to_dense" and "time_ratio_to_all" with quartiles;
        "speedup_over_transformers" and which ("best_transformers_implementation"); "saved_ratio_to_dense",
        "saved_ratio_to_transformers"; "seconds" of each contestant.
    """
    steps = sparse_steps(sizes, num_kept, plan.tokens, DTYPES[dtype_name])
    slow = {"grouped_mm": min(_SLOW_ROUNDS, plan.rounds)}
    seconds = interleaved_seconds(steps, plan.rounds, slow, advance)
    saved = {name: saved_bytes(step.forward, step.parameters()) for name, step in steps.items()}
    best = min(PEERS, key=lambda peer: statistics.median(seconds[peer]))
    row: dict[str, Any] = {
        "case": case_name(sizes), "num_kept": num_kept, "share": num_kept / sizes[1], "dtype": dtype_name,
        "speedup_over_transformers": ratio(seconds[best], seconds["kept"])["median"],
        "best_transformers_implementation": best,
        "saved_ratio_to_dense": saved["kept"] / saved["dense"],
        "saved_ratio_to_transformers": saved["kept"] / saved[best],
        "seconds": seconds,
    }  # fmt: skip
    for other in ("dense", "all"):
        found = ratio(seconds["kept"], seconds[other])
        row[f"time_ratio_to_{other}"] = found["median"]
        row[f"time_ratio_to_{other}_quartiles"] = [found["low"], found["high"]]
    return row


def measure(plan: Plan, threads: Sequence[int], advance: Callable[[str], Any]) -> dict[str, Any]:
    """Run the benchmark: every case on every number of threads.

    Args:
        plan: what is measured.
        threads: numbers of threads.
        advance: called with the name of the case after each timed step.

    Returns:
        The results as written by `--json`.
    """
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "float32_matmul": None, "kernel": selected_kernel(), "rounds": plan.rounds, "tokens": plan.tokens, "layers": [],
    }  # fmt: skip
    with float32_matmul("auto") as results["float32_matmul"]:
        for count in threads:
            with threads_in_use(count) as cores:
                for (sizes, kept), dtype in itertools.product(plan.cases, DTYPES):
                    case = f"{case_name(sizes)} K{kept}, {count} thread{'s' if count > 1 else ''}"
                    row = measure_case(sizes, kept, dtype, plan, partial(advance, case))
                    results["layers"].append({**row, "threads": count, "cores": cores})
    return {**results, **describe()}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "A step is forward and backward. Ratios are medians over interleaved rounds (quartiles in brackets). Dense: "
        "nn.Linear SwiGLU of the width of all experts; all: this project's layer with every expert.",
        f"float32 matrix products in oneDNN's {results['float32_matmul']} mode on all sides; gated activation: "
        f"{results['kernel']}; {results['tokens']} tokens.",
        "",
        "| layer | K | K / N | dtype | threads | time / dense | time / all | x transformers (best) | saved / dense "
        "| saved / transformers |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["layers"]:
        times = [
            "{:.3f} [{:.2f} {:.2f}]".format(
                row[f"time_ratio_to_{name}"], *row[f"time_ratio_to_{name}_quartiles"]
            )
            for name in ("dense", "all")
        ]
        lines.append(
            f"| {row['case']} | {row['num_kept']} | {row['share']:.3f} | {row['dtype']} | {row['threads']} "
            f"| {times[0]} | {times[1]} "
            f"| {row['speedup_over_transformers']:.2f} ({row['best_transformers_implementation']}) "
            f"| {row['saved_ratio_to_dense']:.3f} | {row['saved_ratio_to_transformers']:.3f} |"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Measure (or read earlier results), print the table or write JSON and record."""
    results = results_of(args, partial(_measured, args))
    with reading(args):
        text, command = table(results), command_for_threads(args, "bench_sparse_training.py", results)
    give(args, results, text, "Training with K of N experts", command)


def _measured(args: argparse.Namespace, advance: Callable[[str], Any]) -> dict[str, Any]:
    plan = QUICK if args.quick else FULL
    plan = replace(plan, rounds=checked_rounds(args) or plan.rounds)
    return measure(plan, checked_threads(args.threads), advance)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line and run.

    Args:
        argv: the command line; None: that of the process.
    """
    parser = benchmark_parser("bench_sparse_training.py", __doc__ or "", EXAMPLES)
    add_plan_arguments(parser, "15")
    return run_reporting_errors(lambda: run(parser.parse_args(argv)))
