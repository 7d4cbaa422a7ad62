"""`dsmoe sparsify`: give a densely trained checkpoint a routing policy."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from dsmoe.allocator import keep_freed_memory
from dsmoe.checkpoint.pretrained import load_pretrained, stored_dtype
from dsmoe.data.agreement import check_tokenizer
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.windows import evaluation_batches, text_batches
from dsmoe.environment import default_device
from dsmoe.errors import UserError, reason_of
from dsmoe.files import check_new_folder
from dsmoe.model import DSMoEForCausalLM
from dsmoe.sparsify.arguments import EPILOG, SEED, SEQUENCE_LENGTH, SPLIT, add_arguments
from dsmoe.sparsify.budget import calibrated
from dsmoe.sparsify.calibration import CalibrationText, read_documents, sample_corpus, sample_documents
from dsmoe.sparsify.measure import measure
from dsmoe.sparsify.policies import TAKES, PolicyRequest, check_target, resolve_all
from dsmoe.sparsify.unused import remove_unused
from dsmoe.sparsify.write import human_report, sparsity_report, without_infinities, write_sparse

# a policy by hand -> what it can't be combined with
_ONLY_BY_HAND = ("threshold", "k", "top_p", "attention_policy", "attention_threshold", "attention_k")
_GOALS = ("max_loss_increase", "target_active", "max_flops_per_token")


def add_parser(subparsers: Any) -> None:
    """Add `sparsify` to the command line."""
    parser = subparsers.add_parser(
        "sparsify", help="give a densely trained checkpoint a routing policy", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Sparsify as the arguments say; raises UserError on bad input, before anything is written."""
    _check(args)
    args.seed = SEED if args.seed is None else args.seed
    args.split = SPLIT if args.split is None else args.split
    keep_freed_memory()
    model, folder = load_pretrained(args.checkpoint, torch.float32)
    args.sequence_length = _sequence_length(args.sequence_length, model)
    model = _on_device(model, args.device or default_device())
    found = (
        _by_hand(args, model, folder)
        if args.policy
        else calibrated(args, model, _sample(args, model, folder))
    )
    found = without_infinities(found)
    write_sparse(model, found, args.output, folder, args.overwrite, args.dtype or stored_dtype(folder))
    print(json.dumps(found, indent=2) if args.json else human_report(found))
    if not args.json:
        print(f"written to {args.output}")


def _sequence_length(asked: int | None, model: DSMoEForCausalLM) -> int:
    longest = model.config.max_position_embeddings
    if asked is not None and asked > longest:
        raise UserError(
            f"--sequence-length {asked}: the model has max_position_embeddings {longest}; it must be at most that"
        )
    return min(SEQUENCE_LENGTH, longest) if asked is None else asked


def _on_device(model: DSMoEForCausalLM, device: str) -> DSMoEForCausalLM:
    try:
        return model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def _check(args: argparse.Namespace) -> None:
    # the model of a run's folder is in final/
    inputs = [args.checkpoint, args.checkpoint / "final", args.data, args.text]
    check_new_folder(args.output, overwrite=args.overwrite, inputs=filter(None, inputs))
    for name in ("max_tokens", "sequence_length", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{_option(name)} {value}: must be at least 1")
    _check_text_options(args)
    flops = args.max_flops_per_token
    if flops is not None and not 0 < flops < math.inf:
        raise UserError(f"--max-flops-per-token {flops:g}: must be a number above 0")
    if args.remove_unused is not None and not 0 <= args.remove_unused < 1:
        raise UserError(
            f"--remove-unused {args.remove_unused}: must be a share of the tokens, from 0 to below 1"
        )
    goals = [name for name in _GOALS if getattr(args, name) is not None]
    if args.policy is None and len(goals) != 1:
        options = ", ".join(map(_option, _GOALS))
        raise UserError(f"give one of {options} (found by calibration), or --policy (by hand)")
    if args.policy is not None:
        mixed = [name for name in goals if name != "target_active"]
        mixed += ["family"] * (args.family != "auto") + ["score"] * (args.score != "gate")
    else:
        mixed = [name for name in _ONLY_BY_HAND if getattr(args, name) is not None]
    if mixed:
        raise UserError(f"{_option(mixed[0])} goes {'without' if args.policy else 'only with'} --policy")
    if args.policy is not None:
        _check_policy_options(args)


def _check_text_options(args: argparse.Namespace) -> None:
    """Refuse options of the text that have no effect on it."""
    if args.seed is not None and args.policy is not None:
        raise UserError(
            f"--seed {args.seed}: with --policy no text is drawn (it is spread over a split, or begins a file); leave "
            "--seed out"
        )
    if args.split is not None and args.data is None:
        where = "no text is measured" if args.text is None else f"{args.text} is a file, which has no splits"
        raise UserError(f"--split {args.split}: {where}; --split goes with --data")
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed {args.seed}: must be at least 0")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_policy_options(args: argparse.Namespace) -> None:
    """Refuse options that no policy takes, rather than pass over them."""
    followed = args.attention_policy or _followed(args.policy)
    for name in ("threshold", "k", "top_p", "target_active"):
        # attention experts without a threshold of their own take that of the MLP experts; there is one --top-p
        shared = name in ("threshold", "top_p") and name in TAKES[followed]
        if not shared:
            _check_taken(args, name, name, args.policy)
    for name in ("threshold", "k"):
        _check_taken(args, f"attention_{name}", name, followed)
    if args.threshold is not None and args.target_active is not None:
        raise UserError(
            f"--target-active {args.target_active:g} chooses the threshold that --threshold {_given(args.threshold)} "
            "sets; give one of them"
        )


def _check_taken(args: argparse.Namespace, option: str, name: str, policy: str) -> None:
    value = getattr(args, option)
    if value is not None and name not in TAKES[policy]:
        takers = " or ".join(one for one in TAKES if name in TAKES[one])
        part = "attention experts" if option.startswith("attention") else "MLP experts"
        raise UserError(
            f"{_option(option)} {_given(value)}: the policy of the {part} is {policy!r}, which has no use for it; it "
            f"goes with {takers}"
        )


def _given(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _followed(policy: str) -> str:
    """The policy of attention experts where none is named."""
    return policy if policy in ("threshold", "top_p") else "dense"


def _by_hand(args: argparse.Namespace, model: DSMoEForCausalLM, folder: Path) -> dict[str, Any]:
    """Set the policies that were named; the report."""
    _check_smoe(args, model)
    batches = _batches(args, folder, model)
    calibrate = None if batches is None else (lambda: measure(model, batches, progress="measuring"))
    requests = {
        "mlp": PolicyRequest(args.policy, args.k, args.threshold, args.top_p, args.target_active),
        "attention": _attention_request(args, model),
    }
    active = resolve_all(model, requests, calibrate)
    if active is None and not _counts_are_fixed(model):
        raise UserError(
            f"how many experts policy {args.policy!r} keeps depends on the text: pass --text FILE or --data TOKEN_FOLDER"
        )
    removed = None
    if args.remove_unused is not None:
        if active is None or calibrate is None:
            raise UserError("--remove-unused needs text: pass --text FILE or --data TOKEN_FOLDER")
        removed = remove_unused(model, active, args.remove_unused)
        active = calibrate()
        for part, request in requests.items():
            if request is not None and request.target_active is not None:
                check_target(part, request.target_active, active.share(part))
    report = sparsity_report(model, active, args.sequence_length)
    return report if removed is None else {**report, "removed_experts": removed}


def _check_smoe(args: argparse.Namespace, model: DSMoEForCausalLM) -> None:
    """Refuse an SMoE that keeps all its experts by policy "dense": no such checkpoint can be loaded."""
    in_mlp = model.config.num_experts > 1
    chosen = args.policy if in_mlp else args.attention_policy or _followed(args.policy)
    if model.config.kind == "smoe" and chosen == "dense":
        option, part = ("--", "mlp") if in_mlp else ("--attention-", "attention")
        raise UserError(
            f"{option}policy dense: an SMoE runs sparsely; for all its experts pass {option}policy top_k "
            f"{option}k {model.config.num_experts_of(part)}"
        )


def _counts_are_fixed(model: DSMoEForCausalLM) -> bool:
    config = model.config
    policies = [
        config.routing(part, i) for part in ("mlp", "attention") for i in range(config.num_hidden_layers)
    ]
    return all(policy["policy"] == "dense" or policy.get("k") for policy in policies)


def _attention_request(args: argparse.Namespace, model: DSMoEForCausalLM) -> PolicyRequest:
    if model.config.num_attention_experts == 1 and args.attention_policy is None:
        for name in ("attention_threshold", "attention_k"):
            if (value := getattr(args, name)) is not None:
                raise UserError(f"{_option(name)} {_given(value)}: the model has no attention experts")
        return PolicyRequest("dense")
    name = args.attention_policy or _followed(args.policy)
    threshold = args.attention_threshold or args.threshold
    target = None
    if name in ("threshold", "threshold_top_k") and threshold is None:
        target = args.target_active
    return PolicyRequest(name, args.attention_k, threshold, args.top_p, target)


def _sample(args: argparse.Namespace, model: DSMoEForCausalLM, folder: Path) -> CalibrationText:
    """A seeded sample of the text, to calibrate on."""
    sizes = (args.max_tokens, args.sequence_length, args.batch_size, args.seed)
    if args.data is not None:
        return sample_corpus(_corpus(args, model, folder), args.split, *sizes)
    if args.text is not None:
        return sample_documents(args.text, _tokenizer(folder), *sizes)
    raise UserError("calibration needs text: pass --calibration FILE or --data TOKEN_FOLDER")


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # transformers and tokenizers raise many kinds for files that are missing or damaged
    except Exception as error:
        raise UserError(
            f"{folder}: the checkpoint's tokenizer can't be read ({reason_of(error)}); --data TOKEN_FOLDER needs none"
        ) from None


def _corpus(args: argparse.Namespace, model: DSMoEForCausalLM, folder: Path) -> TokenCorpus:
    corpus = TokenCorpus(args.data)
    if corpus.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{args.data}: {corpus.vocab_size} vocabulary entries, the model has {model.config.vocab_size}"
        )
    if (note := check_tokenizer(corpus, folder)) is not None:
        print(note, file=sys.stderr)
    return corpus


def _batches(
    args: argparse.Namespace, folder: Path, model: DSMoEForCausalLM
) -> list[dict[str, Tensor]] | None:
    """At most --max-tokens of the text: windows spread over a split, or first batches of a file; None without text."""
    if args.data is not None:
        return list(
            evaluation_batches(
                _corpus(args, model, folder), split=args.split, sequence_length=args.sequence_length,
                batch_size=args.batch_size, max_tokens=args.max_tokens,
            )
        )  # fmt: skip
    if args.text is not None:
        tokenizer = _tokenizer(folder)
        batches = text_batches(tokenizer, read_documents(args.text), args.sequence_length, args.batch_size)
        return list(_first(batches, args.max_tokens))
    return None


def _first(batches: Iterator[dict[str, Tensor]], max_tokens: int) -> Iterator[dict[str, Tensor]]:
    seen = 0
    for batch in batches:
        yield batch
        seen += int(batch["attention_mask"].sum())
        if seen >= max_tokens:
            return
