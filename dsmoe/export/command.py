"""`dsmoe export`: write a checkpoint for stock tools: as an architecture that transformers ships, or for llama.cpp."""

import argparse
import json
from pathlib import Path
from typing import Any

from dsmoe.export.gguf import GGUF_DTYPES
from dsmoe.export.requirements import FORMATS
from dsmoe.export.write import export

EPILOG = """formats:
  olmoe     OLMoE (qk_norm full): one K for all tokens and layers; a dense twin becomes one expert
  qwen2moe  Qwen2-MoE (qk_norm none): one K for all tokens and layers; its shared expert is one unit of zeros
  llama     Llama (qk_norm none): a dense twin
  dsmoe     the native architecture, in another dtype; keeps thresholds, K per layer and attention experts
  gguf      a file for llama.cpp, with the tokenizer: OLMoE (qk_norm full), Qwen2-MoE or Llama (qk_norm none); one K,
            gates "softmax"; needs `pip install gguf`

Folder or file appear only after they were loaded afresh and gave the original's logits. A GGUF file is run in llama.cpp
as well where llama-cpp-python is installed.

examples:
  dsmoe sparsify runs/dsmoe/final --policy top_k --k 4 --output runs/dsmoe-top4
  dsmoe export runs/dsmoe-top4 --format olmoe --output runs/dsmoe-top4-olmoe
  dsmoe export runs/dsmoe-top4 --format olmoe --dtype bfloat16 --untie --output DIR          for vLLM
  dsmoe export runs/dsmoe-top4 --format gguf --dtype bfloat16 --output dsmoe-top4.gguf              for llama.cpp
  dsmoe export runs/dsmoe-top4 --format qwen2moe --dtype bfloat16 --output DIR
  dsmoe export runs/dense/final --format llama --output DIR
  dsmoe export runs/dsmoe-threshold --format dsmoe --dtype bfloat16 --output DIR --json"""


def add_parser(subparsers: Any) -> None:
    """Add `export` to the command line."""
    parser = subparsers.add_parser(
        "export", help="write a checkpoint for stock tools (OLMoE, Qwen2-MoE, Llama, GGUF)", description=__doc__,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="dsmoe model folder, or folder of a finished run")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see below")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; file for gguf")
    parser.add_argument(
        "--dtype",
        choices=tuple(GGUF_DTYPES),
        help="of the weights (default: the checkpoint's, or float32 where the format can't have that); float16: dsmoe "
        "and gguf alone",
    )
    parser.add_argument(
        "--untie",
        action="store_true",
        help="store the output projection of a tied model beside its embedding table (vLLM wants it; gguf always)",
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out of a GGUF file")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a folder that is not empty, or a file"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Export as the arguments say; raises UserError on bad input, before the folder appears."""
    report = export(
        args.checkpoint, args.format, args.output, args.dtype,
        untie=args.untie, tokenizer=not args.no_tokenizer, overwrite=args.overwrite,
    )  # fmt: skip
    print(json.dumps(report, indent=2) if args.json else human_report(report, args.output))


def human_report(report: dict[str, Any], output: Path) -> str:
    """The report as a few lines."""
    name = f"GGUF, {report['architecture']}" if report["format"] == "gguf" else report["architecture"]
    lines = [
        f"{name} in {report['dtype']}, checked on {report['num_positions']} random tokens:",
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
    if report.get("tokenizer"):
        lines.append(
            f"  tokenizer                      {report['tokenizer']['tokens']:,} tokens, pre {report['tokenizer']['pre']}"
        )
    if report.get("llama_cpp"):
        lines += _engine_lines(report["llama_cpp"])
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join([*lines, f"written to {output}"])


def _engine_lines(engine: dict[str, Any]) -> list[str]:
    texts = "" if engine["num_texts"] is None else f"; {engine['num_texts']} texts cut into the same tokens"
    return [
        f"in llama.cpp (llama-cpp-python {engine['version']}), on the same tokens:",
        f"  mean |difference of log p|     {engine['mean_abs_logp_difference']:.2e}",
        f"  same most likely token         {engine['argmax_agreement']:.1%}{texts}",
    ]
