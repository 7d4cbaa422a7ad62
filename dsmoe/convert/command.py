"""`dsmoe split`: cut the MLPs of a dense checkpoint into experts; with all of them it is the same function as before."""

import argparse
import json
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.pretrained import save_pretrained
from dsmoe.config.model import GATE_NORMALIZATIONS
from dsmoe.convert.assignment import ASSIGNMENTS
from dsmoe.convert.outlook import export_formats, outlook
from dsmoe.convert.split import split_dense
from dsmoe.convert.stock import load_dense
from dsmoe.errors import UserError
from dsmoe.export.check import EXACT, check_tokens, compare, outputs_of
from dsmoe.files import check_new_folder

EPILOG = """What comes out is the start of a training with the MI loss, not yet a model to sparsify: its routers are zero
and sharpen slowly. A coefficient that is enough from scratch (1e-3 to 3e-3) leaves them even; 3e-2 was the best of four
in our trial (eval/records/quality-from-dense).

Of transformers' models those are taken that have no RoPE scaling (so not Llama 3.1 and later), no biases, and no sliding
window shorter than the longest context. Stock formats and GGUF hold no L2 gates (the default here): to export the model
later, split with --gate-normalization softmax (renormalized: to a stock format, not to GGUF). Whatever the gates, a model
with qk_norm per_head (Qwen3), or with heads that are not hidden_size / num_attention_heads wide, can't be exported to
them. The last line that is printed says what holds for the model at hand.

examples:
  dsmoe split runs/dense --num-experts 32 --output runs/split
  dsmoe split runs/dense --num-experts 32 --top-k 8 --output runs/split-smoe
  hf download HuggingFaceTB/SmolLM2-135M --local-dir smollm2 && dsmoe split smollm2 --num-experts 32 --output split
  python train/pretrain.py --train.init_from runs/split --data.path DATA --router_loss.router_mi_loss_coef_mlp 3e-2"""


def add_parser(subparsers: Any) -> None:
    """Add `split` to the command line."""
    parser = subparsers.add_parser(
        "split", help="cut a dense checkpoint into experts, as the start of a DS-MoE", description=__doc__,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "checkpoint", type=Path,
        help="dense model: of dsmoe (folder or run), or a folder of Llama, Mistral or Qwen3 (see below which)",
    )  # fmt: skip
    parser.add_argument(
        "--num-experts", type=int, required=True, help="of a layer; a divisor of the MLPs' width"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--assignment", choices=ASSIGNMENTS, default="contiguous",
        help="hidden units in their order, or those with like input weights together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--gate-normalization", choices=GATE_NORMALIZATIONS, default="l2",
        help="how gates follow from the router; l2 can't be exported to stock formats or GGUF (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="make an SMoE that trains with K experts a token, as the baseline",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of clusters and an SMoE's routers (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Split as the arguments say; raises UserError on bad input, before the folder appears."""
    output: Path = args.output
    # what torch's generators take, with a layer's number added
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed {args.seed}: must be from 0 to 2^63 - 1")
    # the model of a run's folder is in final/
    inputs = (args.checkpoint, args.checkpoint / "final")
    check_new_folder(output, overwrite=args.overwrite, inputs=inputs)
    model, folder, dtype = load_dense(args.checkpoint)
    tokens_BS = check_tokens(model.config.vocab_size, model.config.max_position_embeddings)
    before = outputs_of(model, tokens_BS)
    result: Any = split_dense(
        model, args.num_experts, args.assignment, args.gate_normalization, args.seed, args.top_k
    )
    difference = None
    if args.top_k is None:
        difference = compare(before, outputs_of(result, tokens_BS), None).max_relative_difference
    if difference is not None and not difference <= EXACT.largest:
        raise UserError(
            f"{args.checkpoint}: the split model gives other logits (relative difference {difference:.1e})"
        )
    config = result.config
    report = {
        "checkpoint": str(args.checkpoint),
        "kind": config.kind,
        "num_experts": config.num_experts,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_params_total": sum(parameter.numel() for parameter in result.parameters()),
        "assignment": args.assignment,
        "gate_normalization": args.gate_normalization,
        "dtype": str(dtype).removeprefix("torch."),
        "max_relative_difference": difference,
        "export_formats": export_formats(config)[0],
        "output": str(output),
    }
    save_pretrained(result.to(dtype), output, folder, overwrite=args.overwrite)
    print(json.dumps(report, indent=2) if args.json else f"{human_report(report)}\n{outlook(config)}")


def human_report(report: dict[str, Any]) -> str:
    """The report as a few lines."""
    difference = report["max_relative_difference"]
    compared = (
        "an SMoE: not the function of the dense model"
        if difference is None
        else f"largest relative difference of logits to the dense model: {difference:.1e}"
    )
    return (
        f"{report['num_experts']} experts of {report['moe_intermediate_size']} hidden units in every layer, "
        f"{report['num_params_total']:,} parameters, {report['dtype']}\n"
        f"{compared}\n"
        f"written to {report['output']}"
    )
