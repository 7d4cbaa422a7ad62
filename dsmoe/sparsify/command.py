"""`dsmoe sparsify`: give a densely trained checkpoint a routing policy."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.config.routing import POLICY_NAMES
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.documents import read_texts
from dsmoe.data.windows import evaluation_batches, text_batches
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, set_routing
from dsmoe.sparsify.measure import measure
from dsmoe.sparsify.policies import PolicyRequest, resolve
from dsmoe.sparsify.write import human_report, sparsity_report, write_sparse

EPILOG = """examples:
  dsmoe sparsify runs/dsmoe/final --policy threshold --threshold 0.48 --data DATA --output runs/dsmoe-sparse
  dsmoe sparsify runs/dsmoe/final --policy threshold --target-active 0.33 --text calibration.jsonl --output DIR
  dsmoe sparsify runs/dsmoe/final --policy top_k --k 5 --output DIR
  dsmoe sparsify runs/dsmoe/final --policy top_k --k 8,5,4,5 --output DIR          one K per layer
  dsmoe sparsify runs/dsmoe/final --policy threshold_top_k --threshold 0.48 --text calibration.jsonl --output DIR

The attention experts of a model that has them follow the same threshold or top_p, and keep all under top_k, as in
arXiv 2404.05567; --attention-policy says otherwise."""


def add_parser(subparsers: Any) -> None:
    """Add `sparsify` to the command line."""
    parser = subparsers.add_parser(
        "sparsify", help="give a densely trained checkpoint a routing policy", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, help="model folder, or folder of a finished run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.add_argument("--policy", required=True, choices=POLICY_NAMES, help="policy of the MLP experts")
    parser.add_argument(
        "--threshold", type=_list_of(float), help="keep experts with N * p above this; one or one per layer"
    )
    parser.add_argument(
        "--target-active", type=float, help="find the global threshold for this share of active MLP experts"
    )
    parser.add_argument(
        "--k", type=_list_of(int), help="experts per token; one or one per layer, comma-separated"
    )
    parser.add_argument("--top-p", type=float, help="probability mass to keep")
    parser.add_argument("--attention-policy", choices=POLICY_NAMES, help="policy of the attention experts")
    parser.add_argument(
        "--attention-threshold", type=_list_of(float), help="as --threshold (default: the same)"
    )
    parser.add_argument("--attention-k", type=_list_of(int), help="as --k")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help="text to measure on (.jsonl, .parquet, .txt, also gzipped)")
    text.add_argument("--data", type=Path, help="token folder to measure on (its validation split)")
    parser.add_argument("--split", default="validation", help="split of --data (default: %(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=50_000, help="tokens to measure on (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=int, default=256, help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, help="windows of a batch (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Sparsify as the arguments say; raises UserError on bad input, before anything is written."""
    if args.output.exists() and any(args.output.iterdir()) and not args.overwrite:
        raise UserError(f"{args.output}: the folder is not empty; name another one or pass --overwrite")
    model, folder = load_pretrained(args.checkpoint, torch.float32)
    batches = _batches(args, folder, model)
    calibrate = None if batches is None else (lambda: measure(model, batches, progress="measuring"))
    requests = {
        "mlp": PolicyRequest(args.policy, args.k, args.threshold, args.top_p, args.target_active),
        "attention": _attention_request(args, model),
    }
    for part in ("mlp", "attention"):
        set_routing(model, part, resolve(model, part, requests[part], calibrate))
    if calibrate is None and not _counts_are_fixed(model):
        raise UserError(
            f"how many experts policy {args.policy!r} keeps depends on the text: pass --text FILE or --data TOKEN_FOLDER"
        )
    active = None if calibrate is None else calibrate()
    report = sparsity_report(model, active, args.sequence_length)
    write_sparse(model, report, args.output, folder, args.overwrite)
    print(json.dumps(report, indent=2) if args.json else human_report(report))
    if not args.json:
        print(f"written to {args.output}")


def _counts_are_fixed(model: DSMoEForCausalLM) -> bool:
    config = model.config
    policies = [
        config.routing(part, i) for part in ("mlp", "attention") for i in range(config.num_hidden_layers)
    ]
    return all(policy["policy"] == "dense" or policy.get("k") for policy in policies)


def _attention_request(args: argparse.Namespace, model: DSMoEForCausalLM) -> PolicyRequest:
    if model.config.num_attention_experts == 1 and args.attention_policy is None:
        return PolicyRequest("dense")
    name = args.attention_policy or (args.policy if args.policy in ("threshold", "top_p") else "dense")
    threshold = args.attention_threshold or args.threshold
    target = None
    if name in ("threshold", "threshold_top_k") and threshold is None:
        target = args.target_active
    return PolicyRequest(name, args.attention_k, threshold, args.top_p, target)


def _batches(
    args: argparse.Namespace, folder: Path, model: DSMoEForCausalLM
) -> list[dict[str, Tensor]] | None:
    """Calibration batches, cut to --max-tokens; None without text."""
    for name in ("max_tokens", "sequence_length", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.data is not None:
        corpus = TokenCorpus(args.data)
        if corpus.vocab_size > model.config.vocab_size:
            raise UserError(
                f"{args.data}: {corpus.vocab_size} vocabulary entries, the model has {model.config.vocab_size}"
            )
        return list(
            evaluation_batches(
                corpus, split=args.split, sequence_length=args.sequence_length, batch_size=args.batch_size,
                max_tokens=args.max_tokens,
            )
        )  # fmt: skip
    if args.text is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        batches = text_batches(tokenizer, read_texts(args.text), args.sequence_length, args.batch_size)
        return list(_first(batches, args.max_tokens))
    return None


def _first(batches: Iterator[dict[str, Tensor]], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    seen = 0
    for batch in batches:
        yield batch
        seen += int(batch["attention_mask"].sum())
        if seen >= max_tokens:
            return


def _list_of(kind: type):
    def parse(text: str) -> list:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r}: give one {kind.__name__}, or several separated by commas"
            ) from None

    return parse
