"""The models of a study at several active shares: `python eval/measure_budgets.py STUDY.yaml --output FOLDER`.

A DS-MoE can run at any share. It is judged at those that its mask phase was steered to, with the thresholds that
training ended with; at others (`--shares`, or where there was no such phase) policies are chosen on the validation split,
as `dsmoe sparsify` does it. An SMoE runs as it was trained, and so has one share; a dense model has share 1.
"""

import argparse
import fnmatch
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dsmoe.allocator import keep_freed_memory
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import Policy
from dsmoe.data.corpus import TokenCorpus
from dsmoe.environment import describe, machine_name
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.files import read_json, write_json
from dsmoe.model import DSMoEForCausalLM
from dsmoe.records import check_outputs, give_results, write_record
from dsmoe.report.budgets_kept import kept_budgets
from dsmoe.report.budgets_pairs import summarise
from dsmoe.report.budgets_plot import budgets_plot
from dsmoe.report.budgets_table import table
from dsmoe.report.token_losses import token_losses
from dsmoe.report.trained_policies import trained_policies
from dsmoe.sparsify.calibrate import calibrate
from dsmoe.sparsify.calibration import CalibrationText, sample_corpus
from dsmoe.sparsify.compare import Policies, reference_policies
from dsmoe.study.kept import digest
from dsmoe.study.launcher import is_finished
from dsmoe.study.spec import Study, StudyRun, read_study

EPILOG = """examples:
  python eval/measure_budgets.py configs/quality/twins.yaml --output runs/quality/twins --data data/quality
  python eval/measure_budgets.py configs/quality/twins.yaml --output runs/quality/twins --data data/quality \\
      --record eval/records/quality

The output folder is that of train/study.py. What was measured of a run is kept in it (budgets.json), so that a second
call measures new runs only.
"""
BATCH_SIZE = 16
SHARES = (0.15, 0.25, 0.35, 0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        prog="measure_budgets.py",
    )  # fmt: skip
    parser.add_argument("study", help="the study's YAML")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of the study's runs"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="token folder")
    parser.add_argument(
        "--shares", type=_shares, metavar="LIST",
        help="active shares of every DS-MoE, besides those of the study's SMoEs of as many experts (default: those that "
        "its mask phase was steered to; without such a phase .15,.25,.35,.5)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=200_000, help="of each split to judge on (default: %(default)s)"
    )
    parser.add_argument(
        "--calibration-tokens", type=int, default=32_768,
        help="of the validation split, to choose thresholds on (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--sequence-length", type=int, default=256, help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="runs whose name matches, for example 'dense-*'"
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to a file; - for stdout")
    parser.add_argument(
        "--record", type=Path, metavar="DIR",
        help="also write a record; what an earlier one there holds of runs that are not in the output folder stays",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return run_reporting_errors(lambda: run(args, " ".join(argv if argv is not None else sys.argv[1:])))


def run(args: argparse.Namespace, words: str) -> None:
    """Measure what isn't yet, and report; raises UserError on bad input."""
    check_outputs(record=args.record, overwrite=True, json=args.json)
    study = read_study(args.study)
    finished = [
        run
        for run in study.runs
        if fnmatch.fnmatch(run.name, args.only) and is_finished(study, run, args.output)
    ]
    if args.record and args.only != "*":
        raise UserError(f"--record needs all runs, and --only {args.only!r} leaves some out")
    kept = kept_budgets(study, args.record, finished)
    if not finished and not kept.rows:
        raise UserError(
            f"{args.output}: no finished run of {args.study} matches {args.only!r}; train/study.py makes them"
        )
    keep_freed_memory()
    texts = Texts(args)
    kept.check_texts(args.record, texts.descriptions)
    trained = _trained_shares(args.output, study.runs)
    of_run: dict[tuple[str, int], Sequence[Mapping[str, Any]]] = {**kept.rows}
    for one in tqdm(finished, desc="runs", unit="run"):
        summary = read_json(args.output / one.name / "summary.json")
        shares = set(trained_policies(summary))
        if args.shares or not shares:
            num_experts = summary["config"]["model"]["num_experts"]
            shares |= {*(args.shares or SHARES), *trained.get(num_experts, ())}
        measured = measured_rows(one, args.output / one.name, texts, sorted(shares))
        known = {"machine": machine_name(summary["environment"].get("hardware", {}))}
        # a folder that no study began says nothing of its settings
        if (args.output / one.name / "study.json").exists():
            known["digest"] = digest(study, one)
        of_run[one.point, one.seed] = [{**row, **known} for row in measured]
    in_order = [of_run[one.point, one.seed] for one in study.runs if (one.point, one.seed) in of_run]
    rows = [row for same in in_order for row in same]
    results = {"runs": rows, "summary": summarise(rows), "texts": texts.descriptions, **describe()}
    report = table(results)
    missing = len(study.runs) - len(in_order)
    give_results(
        results, report, args.json, lambda: _write_record(args, study, results, report, words, missing)
    )


class Texts:
    """The samples that all runs are judged on.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        corpus = TokenCorpus(args.data)

        def sample(split: str, tokens: int, seed: int) -> CalibrationText:
            return sample_corpus(corpus, split, tokens, args.sequence_length, BATCH_SIZE, seed)

        self.calibration = sample("validation", args.calibration_tokens, 1)
        self.judged = {split: sample(split, args.tokens, 0) for split in ("validation", "test")}
        self.sequence_length = args.sequence_length
        self.descriptions = {"calibration": self.calibration.description}
        self.descriptions |= {split: text.description for split, text in self.judged.items()}


def measured_rows(run: StudyRun, folder: Path, texts: Texts, shares: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of one run, each read back where it was measured before on the same text.

    Args:
        run: of the study.
        folder: its folder.
        texts: what to judge on.
        shares: of a DS-MoE.

    Returns:
        "arm" (group and labels), "group", "kind", "budget" (share that was asked for; 1: all experts), "seed",
        "trained" (whether the mask phase was steered to the budget), "mlp_active_fraction" (on the test sample),
        "tokens", "num_params_total", "training_flops", "training_seconds", "validation_loss", "test_loss" (nats per
        token).
    """
    cache = folder / "budgets.json"
    summary = read_json(folder / "summary.json")
    trained = trained_policies(summary)
    key = {"texts": texts.descriptions, "training_seconds": summary["training_seconds"]}
    # older caches have no such entry where nothing was trained
    key["trained"] = {str(share): policy for share, policy in trained.items()}
    kept: dict[float, dict[str, Any]] = {}
    left_out: set[float] = set()
    if cache.exists():
        known = read_json(cache)
        if all({"trained": {}, **known["key"]}.get(name) == value for name, value in key.items()):
            kept = {row["budget"]: row for row in known["rows"]}
            left_out = set(known.get("left_out", ()))
    config = summary["config"]["model"]
    wanted = (
        [share for share in shares if share >= 1 / config["num_experts"]] if config["kind"] == "dsmoe" else []
    )
    if kept and all(budget in kept or budget in left_out for budget in wanted):
        return [row for budget, row in kept.items() if budget in {*wanted, 1.0} or config["kind"] == "smoe"]
    model, _ = load_pretrained(folder, torch.float32)
    shared = {
        "arm": run.point, "group": run.group, "kind": model.config.kind, "seed": run.seed,
        **{name: summary[name] for name in ("tokens", "num_params_total", "training_flops", "training_seconds")},
    }  # fmt: skip
    rows = []
    for budget, policies in budgets_of(model.eval(), texts, shares, trained).items():
        row: dict[str, Any] = kept.get(budget) or {**shared, "budget": budget, "trained": budget in trained}
        for split, text in texts.judged.items() if budget not in kept else ():
            losses, active = token_losses(model, text.batches, policies)
            row[f"{split}_loss"], row["mlp_active_fraction"] = float(np.mean(losses)), active
        rows.append(row)
    left = [row for budget, row in kept.items() if budget not in {row["budget"] for row in rows}]
    left_out |= {share for share in wanted if share not in {row["budget"] for row in rows}}
    write_json(cache, {"key": key, "rows": [*rows, *left], "left_out": sorted(left_out)})
    return rows


def budgets_of(
    model: DSMoEForCausalLM, texts: Texts, shares: Sequence[float], trained: Mapping[float, Policy]
) -> dict[float, Policies]:
    """The policies by which a model is judged, by budget.

    Args:
        model: in evaluation mode.
        texts: whose calibration sample chooses a DS-MoE's policies.
        shares: of a DS-MoE; those that it can't meet are left out.
        trained: of `trained_policies`.
    """
    own = reference_policies(model)
    config = model.config
    if config.kind == "dense":
        return {1.0: own}
    if config.kind == "smoe":
        share = _own_share(config)
        if share is None:
            raise UserError(
                "an SMoE of the study keeps no fixed number of experts, and budgets are those of SMoEs that do (top_k); "
                "leave its runs out with --only"
            )
        return {share: own}
    found: dict[float, Policies] = {1.0: own}
    wanted = [share for share in shares if share >= 1 / config.num_experts]
    frontier = None
    for share in wanted:
        if share in trained:
            found[share] = {**own, "mlp": [trained[share]] * config.num_hidden_layers}
            continue
        if frontier is None:
            frontier = calibrate(model, texts.calibration.batches, context_length=texts.sequence_length)
        try:
            found[share] = frontier.at_share(share).policies
        except UserError as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
    return found


def _own_share(config: DSMoEConfig) -> float | None:
    """The active share that an SMoE was trained with, over its layers; None where it keeps no fixed number of experts."""
    policies = [config.routing("mlp", layer) for layer in range(config.num_hidden_layers)]
    if any(policy.get("k") is None for policy in policies):
        return None
    return sum(policy["k"] for policy in policies) / len(policies) / config.num_experts


def _trained_shares(output: Path, runs: Sequence[StudyRun]) -> dict[int, set[float]]:
    """The shares that the finished SMoEs were trained with, by their number of experts."""
    found: dict[int, set[float]] = defaultdict(set)
    for run in runs:
        if (output / run.name / "summary.json").exists():
            model: Mapping[str, Any] = read_json(output / run.name / "summary.json")["config"]["model"]
            if model["kind"] == "smoe":
                share = _own_share(DSMoEConfig(**model))
                if share is not None:
                    found[model["num_experts"]].add(share)
    return found


def _write_record(
    args: argparse.Namespace, study: Study, results: dict[str, Any], report: str, words: str, missing: int
) -> None:
    if args.record is None:
        return
    partial = f"PARTIAL: {missing} of {len(study.runs)} runs are missing. " if missing else ""
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "results.json", Path(name) / "budgets.png"]
        write_json(files[0], results)
        budgets_plot(results, files[1])
        write_record(
            args.record, title=study.title, command=f"python eval/measure_budgets.py {words}",
            conclusion=f"{partial}{study.conclusion}\n\n{report}", files=files,
            details={"texts": results["texts"]}, overwrite=True,
        )  # fmt: skip


def _shares(text: str) -> list[float]:
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers separated by commas") from None
    if not all(0 < share < 1 for share in found):
        raise argparse.ArgumentTypeError(f"{text!r}: shares must be between 0 and 1")
    return found
