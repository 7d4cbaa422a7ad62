"""`dsmoe polish`: a short fine-tune of a densely trained run with the policies that `dsmoe sparsify` found."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from dsmoe.checkpoint.pretrained import load_pretrained, model_folder
from dsmoe.config.run import RunConfig
from dsmoe.data.corpus import TokenCorpus
from dsmoe.environment import default_device
from dsmoe.errors import UserError
from dsmoe.files import read_json, write_text
from dsmoe.model import set_routing
from dsmoe.sparsify.calibration import sample_corpus
from dsmoe.sparsify.measure import measure
from dsmoe.sparsify.write import human_report, sparsity_report, write_sparse
from dsmoe.trainer import main as train
from dsmoe.trainer.differences import with_defaults

EPILOG = """examples:
  dsmoe sparsify runs/dsmoe --target-active 0.15 --data data/mine --output runs/sparse15
  dsmoe sparsify runs/dsmoe --target-active 0.33 --data data/mine --output runs/sparse33
  dsmoe polish runs/dsmoe --policies runs/sparse15 runs/sparse33 --tokens 1M --output runs/polished
  (then runs/polished/sparse15 and runs/polished/sparse33 hold the same polished weights, one policy each)

Each step runs with the policies of one of the folders, drawn at random, at the learning rate that the run ended with, on
text that follows the run's; besides the next token the model learns from its own all-experts mode. The run's other
settings stay as they were. A run that was cut off continues with the same command."""


def add_parser(subparsers: Any) -> None:
    """Add `polish` to the command line."""
    parser = subparsers.add_parser(
        "polish", help="fine-tune a run shortly with the policies of sparse checkpoints", description=__doc__,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("trained", type=Path, metavar="run", help="folder of the finished run")
    parser.add_argument("--policies", type=Path, nargs="+", required=True, metavar="FOLDER",
                        help="sparse checkpoints of it (folders of `dsmoe sparsify`)")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=tokens, default=tokens("1M"), help="to train on (default: 1M)")
    parser.add_argument("--distill", type=float, default=0.5, metavar="SHARE",
                        help="share of the loss that comes from the all-experts mode (default: %(default)s)")  # fmt: skip
    parser.add_argument("--teacher", default="", metavar="FOLDER",
                        help="frozen model to learn from (default: the model itself, as it is at each step)")  # fmt: skip
    parser.add_argument("--learning-rate", type=float, help="default: the one that the run ended with")
    parser.add_argument("--data", default="", metavar="FOLDER", help="token folder (default: the run's)")
    parser.add_argument("--measure-tokens", type=int, default=50_000,
                        help="validation tokens that reports are measured on (default: %(default)s)")  # fmt: skip
    parser.add_argument("--num-threads", type=int, default=0, help="torch threads (default: torch's)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in the output folder")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Polish; raises UserError on bad input, before anything is written."""
    names = [folder.name for folder in args.policies]
    if len(set(names)) < len(names):
        raise UserError(f"--policies: two folders are called {max(names, key=names.count)!r}; rename one")
    config = polish_config(args)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = args.output / "polish.yaml"
    write_text(settings, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
    status = train(["--config", str(settings)])
    if status:
        raise SystemExit(status)
    for folder in args.policies:
        report = _write(args, config, folder)
        print(f"{args.output / folder.name}\n{human_report(report)}")


def polish_config(args: argparse.Namespace) -> RunConfig:
    """The training run that polishes.

    Raises:
        UserError: no finished run, or one of another kind.
    """
    path = args.trained / "summary.json"
    if not path.is_file():
        raise UserError(f"{args.trained}: no summary.json; name the folder of a finished run")
    summary = read_json(path)
    saved = with_defaults(summary["config"])
    blank = RunConfig()
    sections: dict[str, Any] = {
        name: type(getattr(blank, name))(**value) if isinstance(value, Mapping) else value
        for name, value in saved.items()
    }
    config = RunConfig(**sections)
    if summary["kind"] != "dsmoe":
        raise UserError(
            f"{args.trained}: a {summary['kind']} run; only a DS-MoE has an all-experts mode to learn from"
        )
    for folder in args.policies:
        model_folder(folder)
    optim, train = config.optim, config.train
    trained = config.total_steps
    optim.learning_rate = args.learning_rate or optim.learning_rate * optim.min_lr_ratio
    optim.schedule, optim.min_lr_ratio, optim.warmup_fraction = "cosine", 1.0, 0.02
    config.name = f"{config.name}-polish"
    config.mask_phase.fraction, config.mask_phase.targets = 1.0, []
    config.mask_phase.policies = [str(folder) for folder in args.policies]
    config.distillation.coef, config.distillation.teacher = args.distill, args.teacher
    config.data.path = args.data or config.data.path
    config.data.first_sample = config.data.first_sample + trained * train.global_batch_size
    train.init_from, train.output_dir, train.seeds = str(args.trained), str(args.output), [summary["seed"]]
    train.total_tokens, train.eval_every_tokens, train.num_threads = args.tokens, 0, args.num_threads
    train.resume, train.overwrite = not args.overwrite, args.overwrite
    train.num_processes = None
    config.check()
    return config


def _write(args: argparse.Namespace, config: RunConfig, policies: Path) -> dict[str, Any]:
    """The polished weights with one folder's policies, measured anew."""
    model, folder = load_pretrained(args.output / "final", torch.float32)
    model = model.to(default_device())  # type: ignore[arg-type]
    source, _ = load_pretrained(policies, torch.float32)
    for part in ("mlp", "attention"):
        set_routing(model, part, getattr(source.config, f"{part}_routing"))
    text = sample_corpus(
        TokenCorpus(config.data.path), "validation", args.measure_tokens, config.data.sequence_length, 16, 0
    )
    report = sparsity_report(
        model, measure(model, text.batches, progress="measuring"), config.data.sequence_length
    )
    report["polished"] = {"run": args.trained.name, "tokens": args.tokens, "distill": args.distill}
    write_sparse(model, report, args.output / policies.name, folder, overwrite=True)
    return report


def tokens(text: str) -> int:
    """A number of tokens from "500k", "1M" or "250000".

    Raises:
        ArgumentTypeError: anything else.
    """
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = int(float(text if factor == 1 else text[:-1]) * factor)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of tokens, such as 500k or 1M")
    return value
