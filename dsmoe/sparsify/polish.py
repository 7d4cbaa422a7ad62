"""`dsmoe polish`: a short fine-tune of a densely trained run with the policies that `dsmoe sparsify` found."""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from dsmoe.checkpoint.pretrained import load_pretrained, model_folder, read_config
from dsmoe.config.run import RunConfig
from dsmoe.data.corpus import TokenCorpus
from dsmoe.environment import default_device
from dsmoe.errors import UserError
from dsmoe.files import check_new_folder, read_json, write_text
from dsmoe.model import set_routing
from dsmoe.sparsify.calibration import CalibrationText, sample_corpus
from dsmoe.sparsify.measure import measure
from dsmoe.sparsify.write import REPORT, human_report, sparsity_report, write_sparse
from dsmoe.trainer import main as train
from dsmoe.trainer.differences import with_defaults
from dsmoe.trainer.mask_phase import make_controller

# what a run has in its folder, beside which the polished policies appear under the names of their folders
_OF_THE_RUN = ("checkpoints", "config.json", "config.yaml", "environment.json", "final", "log.jsonl", "run.lock",
               "summary.json")  # fmt: skip

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
    config = polish_config(args)
    places = _places(args, config)
    text = _measured_text(args, config)
    with tempfile.TemporaryDirectory() as name:
        # outside of the output, which the trainer may refuse; there it writes them itself, as config.yaml
        settings = Path(name) / "polish.yaml"
        write_text(settings, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        status = train(["--config", str(settings)])
    if status:
        raise SystemExit(status)
    for folder, place in zip(args.policies, places):
        report = _write(args, config, folder, text, place)
        print(f"{place}\n{human_report(report)}")


def polish_config(args: argparse.Namespace) -> RunConfig:
    """The training run that polishes.

    Raises:
        UserError: no finished run or one of another kind, policies that don't fit it, or options out of range.
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
    optim, train = config.optim, config.train
    trained = config.total_steps
    optim.learning_rate = _learning_rate(args, config)
    optim.schedule, optim.min_lr_ratio, optim.warmup_fraction = "cosine", 1.0, 0.02
    config.name = f"{config.name}-polish"
    config.mask_phase.fraction, config.mask_phase.targets, config.mask_phase.dense_stage = 1.0, [], ""
    config.mask_phase.policies = [str(model_folder(folder)) for folder in args.policies]
    config.distillation.coef, config.distillation.teacher = args.distill, args.teacher
    config.data.path = args.data or config.data.path
    config.data.first_sample = config.data.first_sample + trained * train.global_batch_size
    train.init_from, train.output_dir, train.seeds = str(args.trained), str(args.output), [summary["seed"]]
    train.total_tokens, train.eval_every_tokens, train.num_threads = args.tokens, 0, args.num_threads
    train.resume, train.overwrite = not args.overwrite, args.overwrite
    train.num_processes = None
    config.check()
    _check_models(args, config)
    return config


def _learning_rate(args: argparse.Namespace, config: RunConfig) -> float:
    given = args.learning_rate
    if given is not None and not 0 < given < math.inf:
        raise UserError(f"--learning-rate {given:g}: must be a number above 0")
    ended_with = config.optim.learning_rate * config.optim.min_lr_ratio
    if given is None and not ended_with:
        raise UserError(f"{args.trained}: the run ended with a learning rate of 0; pass --learning-rate")
    return ended_with if given is None else given


def _check_models(args: argparse.Namespace, config: RunConfig) -> None:
    """Refuse policies that the run's model can't have, before it is trained."""
    model = read_config(args.trained)
    make_controller(config.mask_phase, model, config.total_steps)
    if args.teacher:
        model_folder(args.teacher)


def _places(args: argparse.Namespace, config: RunConfig) -> list[Path]:
    """The folders to write, one for each policy: named as the policy's, whichever way that was written.

    Raises:
        UserError: two of one name, a name that the run itself uses, or a folder that is read.
    """
    # of . and .. the name is the folder's own
    names = [(folder.resolve() if folder.name in ("", "..") else folder).name for folder in args.policies]
    for folder, name in zip(args.policies, names):
        if not name or name in _OF_THE_RUN:
            raise UserError(
                f"--policies {folder}: the result would be written to {args.output / name}, which the run itself uses; "
                "rename the folder"
            )
        if names.count(name) > 1:
            raise UserError(f"--policies: two folders are called {name!r}; rename one")
    places = [args.output / name for name in names]
    inputs = [args.trained, args.trained / "final", *args.policies, Path(config.data.path)]
    inputs += [Path(args.teacher)] if args.teacher else []
    for place in (*places, args.output / "final", args.output / "checkpoints"):
        check_new_folder(place, overwrite=True, inputs=inputs)
    for place in places:
        earlier = read_json(place / REPORT) if (place / REPORT).is_file() else {}
        # the same command goes on where it was cut off, and writes again what it has written
        check_new_folder(place, overwrite=args.overwrite or "polished" in earlier)
    return places


def _measured_text(args: argparse.Namespace, config: RunConfig) -> CalibrationText:
    """The text that the reports are measured on; raises UserError where there is none."""
    if args.measure_tokens < 1:
        raise UserError(f"--measure-tokens {args.measure_tokens}: must be at least 1")
    corpus = TokenCorpus(config.data.path)
    if corpus.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{config.data.path}: {corpus.vocab_size} vocabulary entries, the model has {config.model.vocab_size}"
        )
    return sample_corpus(corpus, "validation", args.measure_tokens, config.data.sequence_length, 16, 0)


def _write(
    args: argparse.Namespace, config: RunConfig, policies: Path, text: CalibrationText, place: Path
) -> dict[str, Any]:
    """The polished weights with one folder's policies, measured anew."""
    model, folder = load_pretrained(args.output / "final", torch.float32)
    model = model.to(default_device())  # type: ignore[arg-type]
    source = read_config(policies)
    for part in ("mlp", "attention"):
        set_routing(model, part, getattr(source, f"{part}_routing"))
    report = sparsity_report(
        model, measure(model, text.batches, progress="measuring"), config.data.sequence_length
    )
    report["polished"] = {"run": args.trained.name, "tokens": args.tokens, "distill": args.distill}
    write_sparse(model, report, place, folder, overwrite=True)
    return report


def tokens(text: str) -> int:
    """A number of tokens from "500k", "1M" or "250000".

    Raises:
        ArgumentTypeError: anything else.
    """
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        value = int(float(text if factor == 1 else text[:-1]) * factor)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of tokens, such as 500k or 1M")
    return value
