"""The end of the quickstart: one results.json, three plots and the table.

Reads the runs `dense`, `dense-active` and `dsmoe`, the sparse checkpoint `dsmoe-sparse` and the scores in the
quickstart's folder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.windows import evaluation_batches
from dsmoe.environment import describe
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.evaluation.table import results_table
from dsmoe.files import read_json, write_json
from dsmoe.records import check_record_folder, write_record
from dsmoe.report.plots import expert_use, loss_curves, quality_against_active
from dsmoe.sparsify.frontier import frontier

RUNS = ("dense", "dense-active", "dsmoe")
SPARSE = "dsmoe-sparse"
PLOTS = ("loss_curves.png", "quality_against_active.png", "expert_use.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="the quickstart's folder, for example runs/quickstart")
    parser.add_argument("--record", type=Path, help="also write a record into this folder")
    args = parser.parse_args(argv)
    return run_reporting_errors(lambda: report(args.folder, args.record))


def report(folder: Path, record: Path | None = None) -> None:
    """Write results.json and the plots into the folder and print the table; then the record, if asked for."""
    if record is not None:
        check_record_folder(record)
    scores = read_json(folder / "scores.json")
    summaries = {name: read_json(folder / name / "summary.json") for name in RUNS}
    models = {row["name"]: row for row in scores["models"]}
    missing = [name for name in (*RUNS, SPARSE) if name not in models]
    if missing:
        raise UserError(
            f"{folder / 'scores.json'}: {', '.join(missing)} not scored; run train/quickstart.sh again"
        )
    rows = [models[name] for name in (*RUNS, SPARSE)]
    frontiers = _frontiers(folder, summaries["dsmoe"], scores["settings"])
    losses = {name: models[name]["validation_loss"] for name in models}
    differences = {
        "sparse_minus_all_experts": losses[SPARSE] - losses["dsmoe"],
        "sparse_minus_dense": losses[SPARSE] - losses["dense"],
        "sparse_minus_dense_active": losses[SPARSE] - losses["dense-active"],
        "all_experts_minus_dense": losses["dsmoe"] - losses["dense"],
    }
    write_json(
        folder / "results.json",
        {
            "models": rows,
            "validation_loss_differences": differences,
            "frontiers": frontiers,
            "paired": scores["paired"],
            "task_versions": scores["task_versions"],
            "settings": scores["settings"],
            "seeds": {name: summary["seed"] for name, summary in summaries.items()},
            "resolved_configs": {name: summary["config"] for name, summary in summaries.items()},
            "training": {name: _training(folder / name, summary) for name, summary in summaries.items()},
            **describe(),
        },
    )
    loss_curves({name: _log(folder / name) for name in RUNS}, folder / PLOTS[0])
    quality_against_active(rows, frontiers, folder / PLOTS[1])
    expert_use(read_json(folder / SPARSE / "sparsity.json"), folder / PLOTS[2])
    table, verdict = results_table(rows), _verdict(models[SPARSE], differences)
    print(f"{table}\n{verdict}")
    if record is not None:
        write_record(
            record,
            title="The quickstart",
            command="bash train/quickstart.sh && python eval/report_quickstart.py runs/quickstart --record "
            f"eval/records/{record.name}",
            conclusion=f"{table}\n{verdict}",
            files=[folder / "results.json", *(folder / name for name in PLOTS)],
            details={"seeds": {name: summary["seed"] for name, summary in summaries.items()}},
            overwrite=True,
        )
    print(f"\n{folder / 'results.json'}, " + ", ".join(str(folder / name) for name in PLOTS))


def _verdict(sparse: dict[str, Any], differences: dict[str, float]) -> str:
    """The comparisons that matter, in words, whatever their sign."""
    return "\n".join(
        [
            "",
            f"DS-MoE sparse runs {sparse['mlp_active_fraction']:.1%} of its MLP experts. Its validation loss (nats per "
            "token; negative is better) is",
            f"  {differences['sparse_minus_all_experts']:+.4f} against itself with all experts",
            f"  {differences['sparse_minus_dense']:+.4f} against the dense twin (same total size)",
            f"  {differences['sparse_minus_dense_active']:+.4f} against dense-active (35% of the twin's MLP)",
            "One seed: this run knows nothing of the spread between seeds. The training text is the train splits of the "
            "benchmarks, so the accuracies are in-domain, not zero-shot.",
        ]
    )


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def _training(folder: Path, summary: dict[str, Any]) -> dict[str, Any]:
    rates = sorted(line["tokens_per_second"] for line in _log(folder) if "tokens_per_second" in line)
    return {
        "tokens": summary["tokens"],
        "validation_loss": summary["validation_loss"],
        "median_tokens_per_second": rates[len(rates) // 2],
        "kernel": summary["environment"]["kernel"],
    }


def _frontiers(
    folder: Path, summary: dict[str, Any], settings: dict[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """The DS-MoE at several thresholds and Ks, on the tokens that the models were scored on."""
    model, _ = load_pretrained(folder / "dsmoe", torch.float32)
    config = summary["config"]
    corpus = TokenCorpus(config["data"]["path"])
    batches = list(
        evaluation_batches(
            corpus, split="validation", sequence_length=settings["sequence_length"], batch_size=16,
            max_tokens=settings["data_tokens"],
        )
    )  # fmt: skip
    num_experts = model.config.num_experts
    ks = sorted({max(1, round(num_experts * share)) for share in (0.06, 0.12, 0.19, 0.31, 0.5, 1.0)})
    thresholds = (2.5, 1.2, 0.6, 0.3, 0.1)
    return {
        "top K": frontier(model, batches, [{"policy": "top_k", "k": k} for k in ks]),
        "threshold": frontier(model, batches, [{"policy": "threshold", "threshold": t} for t in thresholds]),
    }


if __name__ == "__main__":
    sys.exit(main())
