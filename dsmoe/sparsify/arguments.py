"""The arguments of `dsmoe sparsify`."""

import argparse
import math
from pathlib import Path
from typing import Any

from dsmoe.checkpoint.pretrained import DTYPES
from dsmoe.config.routing import POLICY_NAMES
from dsmoe.sparsify.families import ALLOCATED, GLOBAL, SCORES

SEQUENCE_LENGTH = 256
# None as argparse's default tells them from what was given, which is refused where it has no effect
SEED, SPLIT = 0, "validation"

EPILOG = """examples:
 as sparse as a bound on quality allows, or as good as a budget allows; layers share the budget by calibration:
  dsmoe sparsify runs/dsmoe/final --max-loss-increase 0.5% --data DATA --split train --output runs/sparse
  dsmoe sparsify runs/dsmoe/final --target-active 0.33 --calibration text.jsonl --remove-unused --output DIR
  dsmoe sparsify runs/dsmoe/final --max-flops-per-token 8e6 --calibration text.jsonl --output DIR
 a policy by hand:
  dsmoe sparsify runs/dsmoe/final --policy threshold --threshold 0.48 --data DATA --output runs/dsmoe-sparse
  dsmoe sparsify runs/dsmoe/final --policy threshold --target-active 0.33 --text calibration.jsonl --output DIR
  dsmoe sparsify runs/dsmoe/final --policy top_k --k 5 --output DIR
  dsmoe sparsify runs/dsmoe/final --policy top_k --k 8,5,4,5 --output DIR          one K per layer
  dsmoe sparsify runs/dsmoe/final --policy threshold_top_k --threshold 0.48 --text calibration.jsonl --output DIR

Calibrate on text that was neither trained on nor will be used to judge the result, where there is enough of it. The
reference, against which a loss increase is measured, is the checkpoint as it is: all experts of a DS-MoE, the trained
K of an SMoE. sparsity.json beside the weights holds all that was measured.

How few experts are enough is mostly decided in training: a DS-MoE whose run ended with a mask phase (mask_phase.fraction
0.4 to 0.7, mask_phase.target_active) is cheap to make as sparse as that; one without lost much more below a half
(eval/records/sparsity-dsmoe), and dsmoe polish made up for a part of it (eval/records/polish).

With --policy, the attention experts of a model that has them follow the same threshold or top_p, and keep all under
top_k, as in arXiv 2404.05567; --attention-policy says otherwise. Under --target-active they get a threshold of their own
for the same share."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all arguments."""
    parser.add_argument("checkpoint", type=Path, help="model folder, or folder of a finished run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES),
        help="of the weights that are written (default: the checkpoint's); losses and counts are always measured in "
        "float32, before they are rounded to it",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_goal(parser.add_argument_group("what is wanted (one of these, or --policy)"))
    _add_calibration(parser.add_argument_group("how it is found"))
    _add_text(parser.add_argument_group("calibration text"))
    _add_policy(parser.add_argument_group("a policy by hand"))


def _add_goal(group: Any) -> None:
    group.add_argument(
        "--max-loss-increase", type=increase, metavar="X",
        help="the fewest active experts whose loss rises by at most this: nats per token (0.005), or a percentage "
        "of perplexity (0.5%%); the increase measured on the calibration text plus one standard error stays within it",
    )  # fmt: skip
    group.add_argument(
        "--target-active", type=share, metavar="SHARE",
        help="the least loss at this share of active experts (0.33 or 33%%): mean over tokens and layers of kept experts "
        "/ all experts; attention experts count with their parameters (with --policy: of the MLP experts, and of "
        "attention experts that follow them, by one global threshold each)",
    )  # fmt: skip
    group.add_argument(
        "--max-flops-per-token", type=float, metavar="X",
        help="the least loss with at most so many FLOPs to generate a token, at a context of --sequence-length",
    )  # fmt: skip
    group.add_argument(
        "--remove-unused", type=float, nargs="?", const=0.0, metavar="SHARE",
        help="remove experts that at most this share of calibration tokens keep (without a number: none of them)",
    )  # fmt: skip


def _add_calibration(group: Any) -> None:
    group.add_argument(
        "--family", default="auto", choices=("auto", *ALLOCATED, *GLOBAL),
        help="policies to choose from; auto: per_layer_threshold, or uniform_k or global_threshold where these measure "
        "better (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--score", default="gate", choices=SCORES,
        help="what experts are ranked by; gate_norm: gate times the mean norm of the expert's output "
        "(default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, help=f"of the sample of text (default: {SEED})")


def _add_text(group: Any) -> None:
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--calibration", "--text", dest="text", type=Path, metavar="FILE",
        help="text to measure on (.jsonl, .parquet, .txt, also gzipped)",
    )  # fmt: skip
    text.add_argument("--data", type=Path, metavar="FOLDER", help="token folder to measure on")
    group.add_argument("--split", help=f"split of --data (default: {SPLIT})")
    group.add_argument(
        "--calibration-tokens", "--max-tokens", dest="max_tokens", type=int, default=50_000, metavar="TOKENS",
        help="tokens to measure on (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--sequence-length", type=int,
        help=f"tokens of a window (default: {SEQUENCE_LENGTH}, or the model's longest where that is shorter)",
    )  # fmt: skip
    group.add_argument("--batch-size", type=int, default=16, help="windows of a batch (default: %(default)s)")
    group.add_argument("--device", help="where to measure (default: cuda where there is one, else cpu)")


def _add_policy(group: Any) -> None:
    group.add_argument("--policy", choices=POLICY_NAMES, help="policy of the MLP experts")
    group.add_argument(
        "--threshold", type=_list_of(float), help="keep experts with N * p above this; one or one per layer"
    )
    group.add_argument(
        "--k", type=_list_of(int), help="experts per token; one or one per layer, comma-separated"
    )
    group.add_argument("--top-p", type=float, help="probability mass to keep")
    group.add_argument("--attention-policy", choices=POLICY_NAMES, help="policy of the attention experts")
    group.add_argument(
        "--attention-threshold", type=_list_of(float), help="as --threshold (default: the same)"
    )
    group.add_argument("--attention-k", type=_list_of(int), help="as --k")


def increase(text: str) -> float:
    """A loss increase in nats per token, from "0.005" or, as a percentage of perplexity, "0.5%".

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        value = float(text.removesuffix("%"))
        nats = math.log1p(value / 100) if text.endswith("%") else value
    except ValueError:
        nats = math.nan
    if not math.isfinite(nats):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give nats per token (0.005) or a percentage of perplexity (0.5%)"
        )
    return nats


def share(text: str) -> float:
    """A share of experts above 0 and at most 1, from "0.33" or "33%".

    Raises:
        ArgumentTypeError: anything else.
    """
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a share above 0 and at most 1 (0.33 or 33%)")
    return value


def _list_of(kind: type) -> Any:
    def parse(text: str) -> list:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give one {kind.__name__}, or several separated by commas"
            ) from None

    return parse
