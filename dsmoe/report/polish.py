"""What polishing did to each of its policies: `python eval/measure_polish.py RUN --polished FOLDER --data TOKENS`."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsmoe.accounting.table import markdown_table
from dsmoe.allocator import keep_freed_memory
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.data.corpus import TokenCorpus
from dsmoe.environment import default_device, describe
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.files import write_json
from dsmoe.model import DSMoEForCausalLM
from dsmoe.records import add_record_arguments, check_outputs, give_results, write_concluded_record
from dsmoe.report.token_losses import token_losses
from dsmoe.sparsify.calibration import sample_corpus
from dsmoe.sparsify.compare import Policies, clustered_error, clusters, reference_policies

EPILOG = """examples:
  python eval/measure_polish.py runs/sparsity/dsmoe-s0 --polished runs/sparsity/polished --data data/quality
  python eval/measure_polish.py runs/dsmoe --polished runs/polished --data data/mine --json - --record eval/records/polish

The polished folder is one of `dsmoe polish`: `final` (all experts) and one folder for each policy."""

Batches = Sequence[dict[str, Tensor]]
ALL = "all experts"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        prog="measure_polish.py",
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="the run before polishing")
    parser.add_argument(
        "--polished", type=Path, required=True, metavar="FOLDER", help="what `dsmoe polish` wrote"
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="token folder")
    parser.add_argument("--split", default="test", help="text to judge on (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100_000, help="of that text (default: %(default)s)")
    parser.add_argument(
        "--sequence-length", type=int, default=256, help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers to a file; - for stdout")
    add_record_arguments(parser)
    args = parser.parse_args(argv)
    return run_reporting_errors(lambda: run(args, " ".join(argv if argv is not None else sys.argv[1:])))


def run(args: argparse.Namespace, words: str) -> None:
    """Measure and report; raises UserError on bad input."""
    check_outputs(record=args.record, overwrite=args.overwrite, conclusion=args.conclusion, json=args.json)
    names = sorted(path.parent.name for path in args.polished.glob("*/sparsity.json"))
    if not names:
        raise UserError(
            f"{args.polished}: no folder with a sparsity.json there; name a folder of `dsmoe polish`"
        )
    keep_freed_memory()
    text = sample_corpus(TokenCorpus(args.data), args.split, args.tokens, args.sequence_length, 16, 0)
    before, _ = load_pretrained(args.checkpoint, torch.float32)
    after, _ = load_pretrained(args.polished / "final", torch.float32)
    policies = {ALL: reference_policies(after.eval())}
    for name in names:
        policies[name] = reference_policies(load_pretrained(args.polished / name, torch.float32)[0])
    for model in (before, after):
        model.to(default_device())  # type: ignore[arg-type]
    results = {
        "text": text.description,
        "rows": measure_rows(before.eval(), after, text.batches, policies),
        **describe(),
    }
    report = table(results)
    give_results(results, report, args.json, lambda: _write_record(args, results, report, words))


def _write_record(args: argparse.Namespace, results: dict[str, Any], report: str, words: str) -> None:
    if args.record is None:
        return
    with tempfile.TemporaryDirectory() as name:
        write_json(Path(name) / "results.json", results)
        write_concluded_record(
            args.record, given=args.conclusion, tables=report, title="What polishing recovers",
            command=f"python eval/measure_polish.py {words}",
            files=[Path(name) / "results.json"], details={"text": results["text"]},
            overwrite=args.overwrite,
        )  # fmt: skip


def measure_rows(
    before: DSMoEForCausalLM, after: DSMoEForCausalLM, batches: Batches, policies: dict[str, Policies]
) -> list[dict[str, Any]]:
    """Losses under each policy with the weights of before and of after, on the same tokens.

    Args:
        before: in evaluation mode.
        after: likewise.
        batches: held-out text.
        policies: by name; `ALL` first.

    Returns:
        Per policy the loss before and after, both increases over the all-experts loss before, "change" (after minus
        before, paired) with its standard error clustered by document, "recovered" (share of the increase before that is
        gone; None for all experts) and the mean share of active MLP experts before and after.
    """
    found = zip(clusters(batches, before.config.eos_token_id), batches)
    index = torch.cat([ids[batch["shift_labels"] != -100] for ids, batch in found]).numpy()
    rows: list[dict[str, Any]] = []
    reference = 0.0
    for name, chosen in tqdm(policies.items(), desc="policies", unit="policy", leave=False):
        (old, old_active), (new, new_active) = (
            token_losses(model, batches, chosen) for model in (before, after)
        )
        reference = reference or float(old.mean())
        increase = float(old.mean()) - reference
        rows.append(
            {
                "policy": name,
                "active_before": old_active,
                "active_after": new_active,
                "loss_before": float(old.mean()),
                "loss_after": float(new.mean()),
                "increase_before": increase,
                "increase_after": float(new.mean()) - reference,
                "change": float((new - old).mean()),
                "standard_error": clustered_error(new - old, index),
                "recovered": None if name == ALL or increase <= 0 else float((old - new).mean()) / increase,
            }
        )
    return rows


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    rows = [
        [
            row["policy"], f"{row['active_before']:.1%}", f"{row['active_after']:.1%}", f"{row['loss_before']:.4f}",
            f"{row['loss_after']:.4f}", f"{row['increase_before']:+.4f}", f"{row['increase_after']:+.4f}",
            f"{row['standard_error']:.4f}", "" if row["recovered"] is None else f"{row['recovered']:.0%}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    text = results["text"]
    header = ["policy", "active before", "active after", "loss before", "loss after", "increase before", "increase after",
              "SE of the change", "recovered"]  # fmt: skip
    return (
        f"Nats per token on {text['num_tokens']:,} tokens of split {text['split']!r}; increases are over all experts "
        f"before polishing; active: mean share of MLP experts.\n\n{markdown_table(header, rows)}"
    )
