"""`dsmoe plan`: which model should I train?"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.figures import check_figure
from dsmoe.files import check_new_file, write_json
from dsmoe.planner.hardware import Hardware, parse_gpu
from dsmoe.planner.lawfile import PlanningLaw, read_law
from dsmoe.planner.limits import Limits
from dsmoe.planner.memory import SHORT_NAMES, TRAINING_RECIPES, Serving, element_bytes
from dsmoe.planner.plan import ACTIVE_SHARE, Plan, candidate_families, make_plan
from dsmoe.planner.shapes import KINDS, LAW_VOCAB_SIZE
from dsmoe.planner.table import human_table
from dsmoe.planner.units import (
    format_bytes,
    format_count,
    parse_count,
    parse_flops,
    parse_integer,
    parse_memory,
    parse_share,
)

MOST_DAYS = 36_500

EPILOG = """examples:
  dsmoe plan --flops 1e22                                        compute-optimal
  dsmoe plan --memory 24GB --flops 1e22 --context 16384          what fits a 24 GB card, KV cache counted
  dsmoe plan --memory 24GB --flops 1e22 --inference-tokens 1e12 --context 16384 --batch 8 --max-tokens 5e11
  dsmoe plan --gpu h100:8 --days 30                              memory and operations from the hardware
  dsmoe plan --total-params 1.1B --flops 1e21 --num-experts 2,4  equal total size
  dsmoe plan --memory 24GB --max-tokens 500B --json -            no budget of operations; JSON
  dsmoe plan --flops 1e19 --law law.json                         a law of `dsmoe fit`
  dsmoe plan --memory 24GB --flops 1e22 --write-config plan.yaml --plot plan.png

Limits share one plan: training and inference operations together keep to --flops, those of training to --days, weights
of all experts and KV cache to --memory. Of two limits on one thing the smaller holds. Every limit is optional, but size
and tokens must both be bounded by something."""


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan", help="which model to train under limits of memory, operations and tokens", description=__doc__,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    limits = parser.add_argument_group("limits")
    limits.add_argument("--flops", metavar="F", help="operations for training and inference: 1e22, 10 ZFLOP")
    limits.add_argument("--memory", metavar="M", help="for weights and KV cache: 24GB, 24GiB")
    limits.add_argument(
        "--gpu", metavar="NAME[:COUNT]", help="hardware to serve on (and train on, with --days)"
    )
    limits.add_argument(
        "--days",
        type=float,
        help="training days on --gpu: limit the operations of training, and nothing of inference",
    )
    limits.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak with --days (default: %(default)s)"
    )
    limits.add_argument(
        "--training-memory",
        metavar="M",
        help="for weights, gradients and AdamW state in training (default: that of --gpu with --days, else none)",
    )
    limits.add_argument("--max-tokens", metavar="D", help="training tokens that there are: 5e11, 500B")
    limits.add_argument("--max-tokens-per-param", metavar="R", help="training tokens per trained parameter")
    limits.add_argument("--total-params", metavar="N", help="wanted total parameters: 1.1e9, 1.1B")
    use = parser.add_argument_group("inference")
    use.add_argument("--inference-tokens", metavar="D", help="tokens that the model will process: 1e12, 1T")
    use.add_argument("--context", metavar="T", help="tokens of KV cache per sequence (default: no KV cache)")
    use.add_argument("--batch", default="1", metavar="B", help="sequences at a time (default: %(default)s)")
    use.add_argument(
        "--dtype", default="bf16", help=f"of the weights: {', '.join(SHORT_NAMES)} (default: %(default)s)"
    )
    use.add_argument(
        "--kv-dtype", default="", help="of the KV cache (default: as --dtype; bf16 for int8 and int4)"
    )
    models = parser.add_argument_group("candidates")
    models.add_argument(
        "--num-experts", metavar="E[,E]", help="of SMoE and DS-MoE (default: SMoE 2 to 32, DS-MoE 32)"
    )
    models.add_argument("--kinds", default=",".join(KINDS), help="of dense, smoe and dsmoe (default: all)")
    models.add_argument("--active-share", type=float, default=ACTIVE_SHARE,
                        help="mean share of MLP experts that a DS-MoE runs (default: %(default)s)")  # fmt: skip
    models.add_argument(
        "--vocab-size",
        metavar="V",
        help=f"embedding entries (default: the law's runs'; {LAW_VOCAB_SIZE} of the published)",
    )
    law = parser.add_argument_group("law")
    law.add_argument("--law", help="joint (default), tabulated, or a JSON file of `dsmoe fit`")
    law.add_argument("--tabulated", action="store_true", help="the same as --law tabulated")
    law.add_argument(
        "--eta", type=float, help="assumed quality of a DS-MoE: dense loss at eta x N_total (default: 1)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write JSON; - prints it in place of the table")
    output.add_argument("--plot", metavar="PNG", help="plot loss against memory by number of experts")
    output.add_argument("--write-config", metavar="YAML",
                        help="write a configuration for train/pretrain.py; - prints it, not the table")  # fmt: skip
    output.add_argument(
        "--row", type=int, default=1, help="rank of the row for --write-config (default: the best)"
    )
    output.add_argument("--training-recipe", default="autocast", choices=tuple(TRAINING_RECIPES),
                        help="what training keeps per parameter (default: %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Plan as the arguments say; raises UserError on bad input, before anything is written."""
    _check_outputs(args)
    plan = _plan(args)
    if not 1 <= args.row <= len(plan.rows):
        raise UserError(f"--row {args.row}: the plan has {len(plan.rows)} rows, the best is 1")
    if args.write_config:
        from dsmoe.planner.train_config import config_text, write_config

        if args.write_config != "-":
            write_config(plan, args.row, args.write_config)
    if args.plot:
        from dsmoe.planner.plots import plot_plan

        plot_plan(plan, args.plot)
    if args.json == "-":
        print(json.dumps(plan.as_dict(), indent=2))
        return
    if args.json:
        write_json(args.json, plan.as_dict())
    if args.write_config == "-":
        print(config_text(plan, args.row), end="")
        return
    print(human_table(plan))
    for path in (args.json, args.plot, args.write_config):
        if path:
            print(f"written to {path}")


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse places that can't be written before one of them is."""
    given = {"--json": args.json, "--plot": args.plot, "--write-config": args.write_config}
    if args.plot:
        check_figure(args.plot, "--plot")
    seen: dict[str, str] = {}
    for option, path in given.items():
        if not path:
            continue
        if path != "-":
            check_new_file(path, option)
        other = seen.setdefault(str(Path(path).resolve()), option)
        if other != option:
            raise UserError(f"{other} and {option} both name {path}; name two files")


def _plan(args: argparse.Namespace) -> Plan:
    hardware_notes, limits, hardware = _limits(args)
    law = _law(args)
    kinds = [kind.strip() for kind in args.kinds.split(",")]
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds {kind!r} is unknown; known are {', '.join(KINDS)}")
    experts = None
    if args.num_experts is not None:
        experts = [parse_integer(word, "--num-experts") for word in args.num_experts.split(",")]
    share = parse_share(args.active_share, "--active-share")
    vocab_size, vocabulary_notes = _vocabulary(args.vocab_size, law)
    families = candidate_families(law, experts, share, vocab_size, kinds)
    plan = make_plan(families, limits, law)
    plan.notes[:0] = [*hardware_notes, *_one_device_notes(plan, hardware), *vocabulary_notes]
    return plan


def _vocabulary(given: str | None, law: PlanningLaw) -> tuple[int | None, list[str]]:
    """Embedding entries of the candidates (None: `candidate_families` knows), and what makes them doubtful."""
    if given is None:
        unknown = (
            f"{law.name} does not say the vocabulary of its runs, so {LAW_VOCAB_SIZE:,} entries are counted; give theirs "
            "with --vocab-size"
        )
        return None, [] if law.vocab_size else [unknown]
    size = parse_integer(given, "--vocab-size")
    if law.vocab_size in (None, size):
        return size, []
    return size, [
        f"vocabulary {size:,}, and the law's runs had {law.vocab_size:,}: losses are per token of theirs"
    ]


def _one_device_notes(plan: Plan, hardware: Hardware | None) -> list[str]:
    """What can't be served on one of several devices, which is all that this project's own serving uses."""
    if hardware is None or hardware.count == 1:
        return []
    one = hardware.accelerator.memory_bytes
    ranks = [str(rank) for rank, row in enumerate(plan.rows, 1) if row.fields["memory_bytes"] > one]
    if not ranks:
        return []
    return [
        f"{'all rows' if len(ranks) == len(plan.rows) else 'rank ' + ', '.join(ranks)}: to serve takes more than the "
        f"{format_bytes(one)} of one {hardware.accelerator.name}, and `dsmoe serve` uses one device; spreading a model "
        f"over several is another server's work, and --memory {one / 1e9:g}GB plans for one"
    ]


def _limits(args: argparse.Namespace) -> tuple[list[str], Limits, Hardware | None]:
    """Sentences about what the hardware gave, the limits, and the hardware."""

    def read(parse: Any, flag: str) -> Any:
        text = getattr(args, flag.removeprefix("--").replace("-", "_"))
        return None if text is None else parse(text, flag)

    flops, memory = read(parse_flops, "--flops"), read(parse_memory, "--memory")
    training_memory = read(parse_memory, "--training-memory")
    notes: list[str] = []
    hardware, training_flops = None, None
    if args.gpu is None and args.days is not None:
        raise UserError("--days needs --gpu, whose speed it multiplies")
    if args.gpu is not None:
        hardware = parse_gpu(args.gpu)
        given, memory = memory, min(memory or hardware.memory_bytes, hardware.memory_bytes)
        smaller = "" if given is None else ", the smaller of it and --memory"
        notes.append(
            f"memory limit {format_bytes(memory)}{smaller}: {hardware} has {format_bytes(hardware.memory_bytes)}"
        )
        if args.days is not None:
            if not 0 < args.days <= MOST_DAYS:
                raise UserError(
                    f"--days {args.days:g} must be above zero and at most {MOST_DAYS:,} (a century)"
                )
            training_flops = hardware.training_flops(args.days, parse_share(args.mfu, "--mfu"))
            if training_memory is None:  # the hardware trains, so what is trained has to fit it
                training_memory = hardware.memory_bytes
                notes.append(
                    f"training memory limit {format_bytes(training_memory)}, that of {hardware}, which trains "
                    f"({args.training_recipe}, without activations); --training-memory sets another"
                )
            notes.append(
                f"operations of training {training_flops:.3g}, from {args.days:g} days of {hardware} at {args.mfu:.0%} "
                f"of {format_count(hardware.accelerator.peak_flops)} dense bf16 FLOP/s each"
                + ("" if flops is None else f"; with inference {flops:.3g}, by --flops: the smaller holds")
            )
    element_bytes(args.dtype)
    serving = Serving(
        context_length=0 if args.context is None else parse_integer(args.context, "--context", 0),
        batch_size=parse_integer(args.batch, "--batch"),
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
    )
    element_bytes(serving.cache_dtype, "--kv-dtype")
    limits = Limits(
        flops=flops,
        training_flops=training_flops,
        inference_tokens=0.0
        if args.inference_tokens in (None, "0")
        else read(parse_count, "--inference-tokens"),
        memory_bytes=memory,
        training_memory_bytes=training_memory,
        max_tokens=read(parse_count, "--max-tokens"),
        max_tokens_per_param=read(parse_count, "--max-tokens-per-param"),
        total_params=read(parse_count, "--total-params"),
        serving=serving,
        training_recipe=args.training_recipe,
    )
    return notes, limits, hardware


def _law(args: argparse.Namespace) -> PlanningLaw:
    if args.tabulated and args.law not in (None, "tabulated"):
        raise UserError(f"--tabulated and --law {args.law} name two laws; give one of them")
    law = read_law("tabulated" if args.tabulated else args.law)
    if args.eta is None:
        return law
    if not 0 < args.eta < math.inf:
        raise UserError(
            f"--eta {args.eta:g} must be above zero and finite; 1 means as good as the dense twin"
        )
    return law.with_eta(args.eta)
