"""The sparsity sweep of a checkpoint: `python eval/sweep_sparsity.py CHECKPOINT --data TOKENS`."""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dsmoe.allocator import keep_freed_memory
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.data.corpus import TokenCorpus
from dsmoe.environment import default_device, describe
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.evaluation.harness import parse_tasks, score_model
from dsmoe.evaluation.loading import LoadedModel, load_model
from dsmoe.evaluation.table import task_average
from dsmoe.files import check_new_file
from dsmoe.records import add_record_arguments, check_outputs, give_results, write_concluded_record
from dsmoe.report.sparsity_plots import frontier_plot, layers_plot, union_plot
from dsmoe.report.sparsity_table import tables
from dsmoe.sparsify.calibration import sample_corpus
from dsmoe.sparsify.compare import with_policies
from dsmoe.sparsify.points import Points
from dsmoe.sparsify.sweep import CONTESTANTS, Judge, Sample, sweep_bounds, sweep_shares

EPILOG = """examples:
  python eval/sweep_sparsity.py runs/sparsity/dsmoe-s0 --data data/quality --output runs/sparsity/sweep
  python eval/sweep_sparsity.py runs/dsmoe --data data/mine --shares 0.15,0.25,0.35 --bounds 0.005,0.01 --seeds 0,1,2
  python eval/sweep_sparsity.py runs/dsmoe --data data/mine --tasks paper --include-path benchmarks --limit 200
"""
Row = Mapping[str, Any]
KNOBS = (("uniform_k", "gate"), ("global_threshold", "gate"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        prog="sweep_sparsity.py",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="model folder, or folder of a finished run")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="token folder")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="results.json, plots, and what an interrupted sweep goes on from (default: sparsity-sweep in the folder of "
        "a run, MODEL-sparsity-sweep beside that of a model)",
    )
    add_record_arguments(parser)
    parser.add_argument("--shares", type=_numbers, default=None, metavar="LIST",
                        help="active shares (default: multiples of 1/N from 15%% to 60%%, at most 10)")  # fmt: skip
    parser.add_argument("--bounds", type=_numbers, default=[0.002, 0.005, 0.01, 0.02], metavar="LIST",
                        help="loss increases in nats (default: 0.002,0.005,0.01,0.02)")  # fmt: skip
    parser.add_argument("--seeds", type=_numbers, default=[0.0, 1.0, 2.0], metavar="LIST",
                        help="calibration samples; the first is for all families (default: 0,1,2)")  # fmt: skip
    parser.add_argument("--families", default="all", choices=("all", "main"),
                        help="main: uniform K, global threshold and the default family only")  # fmt: skip
    for name, default, text in (
        ("--calibration-split", "validation", "split to choose on"),
        ("--held-out-split", "test", "split to judge on"),
    ):
        parser.add_argument(name, default=default, help=f"{text} (default: %(default)s)")
    for option, number, text in (
        ("--calibration-tokens", 50_000, "tokens to choose on"),
        ("--held-out-tokens", 100_000, "tokens to judge on"),
        ("--sequence-length", 256, "tokens of a window"),
        ("--batch-size", 16, "windows of a batch"),
    ):
        parser.add_argument(option, type=int, default=number, help=f"{text} (default: %(default)s)")
    parser.add_argument("--tasks", help="also score the default family's models: 'paper' or lm-eval names")
    parser.add_argument("--include-path", type=Path, help="folder of `dsmoe data benchmarks`")
    parser.add_argument("--limit", type=int, help="first so many questions of a task")
    args = parser.parse_args(argv)
    return run_reporting_errors(lambda: run(args, " ".join(argv if argv is not None else sys.argv[1:])))


def run(args: argparse.Namespace, words: str) -> None:
    """Sweep, print the tables, write results and plots; raises UserError on bad input."""
    tasks = parse_tasks(args.tasks) if args.tasks else []
    check_outputs(record=args.record, overwrite=args.overwrite, conclusion=args.conclusion)
    wrong = [share for share in args.shares or () if not 0 < share < 1]
    if wrong:
        raise UserError(
            f"--shares: {wrong[0]:g} is no active share; give numbers between 0 and 1, such as 0.15,0.25"
        )
    odd = [seed for seed in args.seeds if seed < 0 or seed != int(seed)]
    if odd:
        raise UserError(f"--seeds: {odd[0]:g} is no seed; give whole numbers from 0, such as 0,1,2")
    bad = [bound for bound in args.bounds if not 0 < bound < float("inf")]
    if bad:
        raise UserError(
            f"--bounds: {bad[0]:g} is no increase of the loss; give nats above 0, such as 0.005,0.01"
        )
    keep_freed_memory()
    model, folder = load_pretrained(args.checkpoint, torch.float32)
    if model.config.num_experts == 1:
        raise UserError(
            f"{args.checkpoint}: has no MLP experts to choose from; a sweep needs a DS-MoE or an SMoE"
        )
    model = model.eval().to(default_device())  # type: ignore[arg-type]
    # "." has no name; results hold no path of a machine, so that it serves for names alone
    place = folder.resolve()
    in_run = place.name == "final"
    name = place.parent.name if in_run else place.name
    if args.output is None:
        args.output = place.parent / ("sparsity-sweep" if in_run else f"{name}-sparsity-sweep")
    check_new_file(args.output / "results.json", "--output")
    results = sweep(model, folder, args)
    if tasks:
        score_rows(results, load_model(str(folder)), tasks, args)
    results = {"model": results.pop("model"), "name": name, **results, **describe()}
    report = tables(results)
    file = args.output / "results.json"
    give_results(results, report, str(file), lambda: _write(args, results, file, report, words))


def _write(args: argparse.Namespace, results: Row, file: Path, report: str, words: str) -> None:
    """The plots, beside the file of the results, and the record."""
    plots = [file.with_name(name) for name in ("frontier.png", "layers.png", "unions.png")]
    frontier_plot(results, plots[0])
    layers_plot(results, plots[1])
    union_plot(results, plots[2])
    if args.record:
        write_concluded_record(
            args.record, given=args.conclusion, tables=report, title=f"The sparsity frontier of {results['name']}",
            command=f"python eval/sweep_sparsity.py {words}", files=[file, *plots],
            details={"text": results["text"]}, overwrite=args.overwrite,
        )  # fmt: skip
    print(f"written to {args.output}" + (f" and {args.record}" if args.record else ""))


def sweep(model: Any, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All measurements but the tasks."""
    corpus = TokenCorpus(args.data)

    def text(split: str, tokens: int, seed: int) -> Any:
        return sample_corpus(corpus, split, tokens, args.sequence_length, args.batch_size, seed)

    held_out = text(args.held_out_split, args.held_out_tokens, 0)
    judge = Judge(model, held_out.batches, args.sequence_length)
    reference = judge.comparer(judge.comparer.reference)
    shares = args.shares or default_shares(model.config.num_experts)
    samples = [text(args.calibration_split, args.calibration_tokens, int(seed)) for seed in args.seeds]
    contestants = [
        one
        for one in CONTESTANTS
        if args.families == "all" or one in (*KNOBS, ("per_layer_threshold", "gate"))
    ]
    about = {"model": _fingerprint(folder), "held_out": held_out.description}
    points = Points(args.output / "points.json", about)
    auto = []
    for number, given in enumerate(samples):
        # one after the other: a frontier keeps hidden states of all its text
        sample = Sample(model, given, judge, points)
        auto.append(_chosen(sample, shares))
        if number == 0:
            rows = sweep_shares(sample, shares, contestants)
            bounds = sweep_bounds(sample, args.bounds)
    third = min(auto[0], key=lambda row: abs(row["share_on_calibration"] - 0.33), default=None)
    layers = None
    if third is not None:
        layers = judge.spread(judge.comparer(third["policies"]), third["policies"])
    return {
        "model": {"num_experts": model.config.num_experts, "num_attention_experts": model.config.num_attention_experts,
                  "kind": model.config.kind, "num_params_total": sum(p.numel() for p in model.parameters())},
        "text": {"held_out": held_out.description, "calibration": [sample.description for sample in samples]},
        "reference": {"loss": reference.reference_loss},
        "shares": shares,
        "rows": rows,
        "calibrated": auto,
        "bounds": bounds,
        "layers_at_a_third": layers,
    }  # fmt: skip


def _chosen(sample: Sample, shares: Sequence[float]) -> list[dict[str, Any]]:
    """What `dsmoe sparsify --target-active` gives at each share that can be met."""
    found = [sample.at_share(share) for share in tqdm(shares, desc="calibrated", unit="share")]
    return [row for row in found if row is not None]


def _fingerprint(folder: Path) -> str:
    """SHA-256 of a model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def default_shares(num_experts: int) -> list[float]:
    """Shares that uniform K meets exactly, from 15% to 60%, at most ten."""
    ks = [k for k in range(1, num_experts + 1) if 0.15 <= k / num_experts <= 0.6]
    step = -(-len(ks) // 10)
    return [k / num_experts for k in ks[::step]]


def score_rows(results: Row, loaded: LoadedModel, tasks: Sequence[str], args: argparse.Namespace) -> None:
    """Add the tasks' average to the reference and to the calibrated models of the first sample."""

    def average(label: str) -> dict[str, Any]:
        found = score_model(loaded, tasks, include_path=args.include_path, limit=args.limit, label=label)[
            "tasks"
        ]
        mean = task_average(found)
        return {"tasks": found, "task_average": None if mean is None else list(mean)}

    results["reference"].update(average("reference"))
    for row in results["calibrated"][0]:
        with with_policies(loaded.model, row["policies"]):
            row.update(average(f"{row['asked']:.0%}"))


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers separated by commas") from None
