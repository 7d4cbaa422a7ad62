"""`dsmoe export`: write a checkpoint as an architecture that transformers ships, without any code of this project."""

import argparse
import json
from pathlib import Path
from typing import Any

from dsmoe.export.requirements import FORMATS
from dsmoe.export.write import DTYPES, export

EPILOG = """formats:
  olmoe     OLMoE (qk_norm full): one K for all tokens and layers; a dense twin becomes one expert
  qwen2moe  Qwen2-MoE (qk_norm none): one K for all tokens and layers; its shared expert is one unit of zeros
  llama     Llama (qk_norm none): a dense twin
  dsmoe     the native architecture, in another dtype; keeps thresholds, K per layer and attention experts

The folder appears only after it was loaded afresh and gave the original's logits.

examples:
  dsmoe sparsify runs/dsmoe/final --policy top_k --k 4 --output runs/dsmoe-top4
  dsmoe export runs/dsmoe-top4 --format olmoe --output runs/dsmoe-top4-olmoe
  dsmoe export runs/dsmoe-top4 --format olmoe --dtype bfloat16 --untie --output DIR          for llama.cpp, vLLM
  dsmoe export runs/dsmoe-top4 --format qwen2moe --dtype bfloat16 --output DIR
  dsmoe export runs/dense/final --format llama --output DIR
  dsmoe export runs/dsmoe-threshold --format dsmoe --dtype bfloat16 --output DIR --json"""


def add_parser(subparsers: Any) -> None:
    """Add `export` to the command line."""
    parser = subparsers.add_parser(
        "export", help="write a checkpoint for stock tools (OLMoE, Qwen2-MoE, Llama)", description=__doc__,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="dsmoe model folder, or folder of a finished run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see below")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--untie",
        action="store_true",
        help="store the output projection of a tied model beside its embedding table (llama.cpp wants it)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export as the arguments say; raises UserError on bad input, before the folder appears."""
    report = export(
        args.checkpoint, args.format, args.output, args.dtype, untie=args.untie, overwrite=args.overwrite
    )
    print(json.dumps(report, indent=2) if args.json else human_report(report, args.output))


def human_report(report: dict[str, Any], output: Path) -> str:
    """The report as a few lines."""
    lines = [
        f"{report['architecture']} in {report['dtype']}, checked on {report['num_positions']} random tokens:",
        f"  largest difference of logits   {report['max_abs_logit_difference']:.2e}",
        f"  relative, median and largest   {report['median_relative_difference']:.2e} "
        f"{report['max_relative_difference']:.2e}",
        f"  same most likely token         {report['argmax_agreement']:.1%}",
    ]
    if report["num_positions_after_tie"]:
        lines.append(
            f"  positions after a tie of experts broken differently: {report['num_positions_after_tie']} "
            f"(gap of router logits up to {report['largest_tie']:.1e}); the largest relative difference leaves them out"
        )
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"written to {output}"])
