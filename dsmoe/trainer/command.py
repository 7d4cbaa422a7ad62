"""The command line of `train/pretrain.py`: strict YAML plus overrides."""

import copy
import dataclasses
import difflib
import json
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from jsonargparse import ArgumentParser, Namespace

from dsmoe.checkpoint import clean_leftovers, holds_checkpoints, told_when_full
from dsmoe.checkpoint.pretrained import model_folder
from dsmoe.config.run import RunConfig
from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.files import load_yaml, read_json, write_json, write_text
from dsmoe.lock import FolderLock
from dsmoe.trainer.differences import changed, with_defaults
from dsmoe.trainer.launch import finish, start, start_trackers
from dsmoe.trainer.loop import TrainingRun
from dsmoe.trainer.outcome import measured_by
from dsmoe.trainer.seeds import check_comparable, compare, summarise
from dsmoe.trainer.signals import Stopped, StopSignals
from dsmoe.trainer.starting_point import adopt_model, check_teacher
from dsmoe.trainer.together import on_main

EPILOG = """examples:
  accelerate launch train/pretrain.py --config configs/quickstart/dsmoe.yaml
  accelerate launch train/pretrain.py --config configs/quickstart/dsmoe.yaml --model.num_experts 32
  torchrun --nproc_per_node 2 train/pretrain.py --config ... --train.micro_batch_size 16
  accelerate launch train/pretrain.py --config ... --train.seeds [0,1,2] --compare_to runs/dense
"""


# what jsonargparse calls a type, and what is meant
_TYPES = {
    "a <class 'int'>": "an integer, such as 1000000",
    "a <class 'float'>": "a number (.nan and .inf are none)",
    "a <class 'bool'>": "true or false",
}


class _Parser(ArgumentParser):
    """Adds the nearest known name to the message for an unknown one."""

    known: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> Any:  # type: ignore[override]
        message = " ".join(str(message).split())
        for name in re.findall(r"(?:Key |--|option |arguments: --)'?([A-Za-z_.0-9]+)", message):
            near = difflib.get_close_matches(name, self.known, n=1, cutoff=0.4)
            if name not in self.known and near:
                message += f"; the nearest known name is {near[0]!r}"
                break
        for name, words in _TYPES.items():
            message = message.replace(name, words)
        print(f"error: {message}", file=sys.stderr)
        self.exit(2)


def build_parser() -> ArgumentParser:
    """The parser of a training run."""
    parser = _Parser(
        description="Train a dense, SMoE or DS-MoE language model.", epilog=EPILOG, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file; what follows on the command line wins")
    parser.add_argument(
        "--compare_to", type=str, default=None, help="another run's output_dir with the same seeds"
    )
    parser.add_argument(
        "--print_only", type=bool, default=False, help="print the resolved configuration and stop"
    )
    parser.add_class_arguments(RunConfig, None)
    names = [action.dest for action in parser._actions]
    sections = {name.rpartition(".")[0] for name in names}
    parser.known = tuple(name for name in names if name not in sections)
    return parser


def parse(argv: Sequence[str] | None = None) -> tuple[RunConfig, Any, str]:
    """The run's configuration, the other arguments, and the resolved YAML.

    Raises:
        UserError: values that can't work; SystemExit with status 2, after a line on stderr, where they are of no setting
            or of the wrong type.
    """
    parser = build_parser()
    namespace = parser.parse_args(argv)
    for path in namespace["config"] or []:
        # jsonargparse takes the last of two keys of one name, and the settings under the first are gone
        load_yaml(str(path))
    for name in ("model", "data", "optim", "router_loss", "mask_phase", "distillation", "guard", "train"):
        if not isinstance(namespace[name], Namespace):
            raise UserError(f"{name} is {namespace[name]!r}; it must be a mapping of settings")
    made = parser.instantiate(namespace)
    sections = {name: getattr(made, name) for name in RunConfig.__dataclass_fields__}
    config = RunConfig(**sections)
    # the limits of a run depend on its model, which with train.init_from is another than the one in `model`
    if config.train.init_from:
        adopt_model(config)
    else:
        config.check()
    config.model_config()
    return config, made, _as_yaml(config)


def _as_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit status (2 for bad input or a full disk, 143 and 130 after SIGTERM and Ctrl-C)."""
    try:
        return run_reporting_errors(lambda: _run(argv))
    except Stopped as stopped:
        return stopped.status


def _run(argv: Sequence[str] | None) -> None:
    config, arguments, resolved = parse(argv)
    if arguments.print_only:
        print(resolved)
        return
    notes = [adopt_model(config), check_teacher(config)]
    _refuse_to_replace_inputs(config)
    if arguments.compare_to:
        _check_twin(config, arguments.compare_to)
    accelerator = start(config)
    for note in filter(None, notes):
        accelerator.print(note)
    root = Path(config.train.output_dir)
    with StopSignals(speak=accelerator.is_main_process) as signals, ExitStack() as held, told_when_full(root):
        on_main(accelerator, lambda: _take_over(root, held))
        end = None
        try:
            summaries = _train_seeds(config, accelerator, signals)
        except Stopped as stopped:
            # without its frames, which hold the model
            end = stopped.with_traceback(None)
        if accelerator.is_main_process:
            if end is None:
                _compare(root, summaries, arguments.compare_to)
            else:
                print(end, file=sys.stderr)
        finish(accelerator)
    if end is not None:
        raise end


def _check_twin(config: RunConfig, folder: str) -> None:
    """Refuse, before training, a run that can't be compared to after it."""
    corpus = TokenCorpus(config.data.path).fingerprint
    try:
        check_comparable(config.train.seeds, corpus, measured_by(dataclasses.asdict(config)), Path(folder))
    except UserError as error:
        raise UserError(f"--compare_to {error}") from None


def _refuse_to_replace_inputs(config: RunConfig) -> None:
    """A run may not write where a model stands that it reads, now or when it is resumed."""
    root = Path(config.train.output_dir)
    read = [
        ("train.init_from", config.train.init_from),
        ("distillation.teacher", config.distillation.teacher),
    ]
    read += [("mask_phase.policies", name) for name in config.mask_phase.policies]
    written = [root, *(root / f"seed-{seed}" for seed in config.train.seeds)]
    for setting, name in read:
        if not name:
            continue
        model = model_folder(Path(name)).resolve()
        for folder in (one.resolve() for one in written):
            if model == folder or {folder / "final", folder / "checkpoints"} & {model, *model.parents}:
                raise UserError(
                    f"--train.output_dir {root}: {setting} {name} stands there, which is read; name another folder"
                )


def _take_over(root: Path, held: ExitStack) -> None:
    """Lock the folder of the run until `held` ends, and delete what a killed process has left half-written."""
    if not root.exists():
        held.callback(_leave_no_empty_folder, root)
    held.enter_context(FolderLock(root, "name another --train.output_dir"))
    folders = [root, *sorted(root.glob("seed-*"))]
    clean_leftovers([*folders, *(folder / "checkpoints" for folder in folders)])


def _leave_no_empty_folder(root: Path) -> None:
    """Remove the folder of a run that was refused; one that holds anything stays."""
    with suppress(OSError):
        root.rmdir()


def _train_seeds(config: RunConfig, accelerator: Accelerator, signals: StopSignals) -> list[dict[str, Any]]:
    """One run a seed, one after the other; returns their summaries."""
    root, summaries = Path(config.train.output_dir), []
    for seed in config.train.seeds:
        folder = _folder_of(config, seed)
        if config.train.resume and (folder / "summary.json").exists():
            summaries.append(_finished(config, seed, folder))
            accelerator.print(f"seed {seed} is finished already ({folder / 'summary.json'})")
            continue
        _refuse_to_replace(config, folder)
        start_trackers(config, seed, accelerator)
        run = TrainingRun(copy.deepcopy(config), seed, folder, accelerator, signals)
        run.begin()
        if accelerator.is_main_process:
            # as it is run: with what the launcher asked for and the model of train.init_from
            write_text(root / "config.yaml", _as_yaml(config))
            # of a run that stood here before; this one's are written at its end
            for name in ("seeds.json", "comparison.json"):
                (root / name).unlink(missing_ok=True)
        summaries.append(run.run())
        # otherwise its weights and moments would stand beside the next model's
        del run
        accelerator.free_memory()
    return summaries


def _compare(root: Path, summaries: list[dict[str, Any]], other: str | None) -> None:
    """Write mean and spread over seeds, and paired differences with another run."""
    if len(summaries) > 1:
        spread = summarise(summaries)
        write_json(root / "seeds.json", spread)
        print(json.dumps(spread))
    if other:
        paired = compare(summaries, Path(other))
        write_json(root / "comparison.json", {"to": other, **paired})
        print(json.dumps(paired))


def _folder_of(config: RunConfig, seed: int) -> Path:
    """The folder of a seed's run: output_dir itself for a single seed, one in it for one of several.

    What stands there in the other form is found when a run is resumed, and never doubled.

    Raises:
        UserError: another run stands in the place that seeds of the other form would have.
    """
    root = Path(config.train.output_dir)
    folder, other = root, root / f"seed-{seed}"
    if len(config.train.seeds) > 1:
        folder, other = other, folder
    finished = other / "summary.json"
    if finished.exists():
        same = read_json(finished)["seed"] == seed
        if same and config.train.resume:
            return other
    else:
        same = holds_checkpoints(other)
    if same:
        raise UserError(
            f"{other}: holds a run already, begun with {'one seed' if other == root else 'several seeds'}; finish it as "
            "it was begun, or name another --train.output_dir"
        )
    return folder


def _finished(config: RunConfig, seed: int, folder: Path) -> dict[str, Any]:
    """The summary of a finished run, which must be one of the same configuration and seed."""
    summary = read_json(folder / "summary.json")
    changes = changed(with_defaults(summary["config"]), dataclasses.asdict(config))
    if summary["seed"] != seed:
        changes.insert(0, f"its seed is {summary['seed']} and train.seeds asks for {seed}")
    if changes:
        raise UserError(
            f"{folder}: holds a finished run of another configuration ({changes[0]}); name another --train.output_dir, "
            "or replace it with --train.overwrite true and without --train.resume"
        )
    return summary


def _refuse_to_replace(config: RunConfig, folder: Path) -> None:
    """Work done is never lost by starting the same command again, nor what isn't a run's by starting one beside it."""
    ours = (folder / "environment.json").exists() or config.train.overwrite
    found = [name for name in ("checkpoints", "final", "log.jsonl") if (folder / name).exists()]
    if found and not ours:
        raise UserError(
            f"{folder}: holds {found[0]!r}, which a run would replace, and no run; name another --train.output_dir, or "
            "replace it with --train.overwrite true"
        )
    holds_run = (folder / "summary.json").exists() or holds_checkpoints(folder)
    if holds_run and not (config.train.resume or config.train.overwrite):
        raise UserError(
            f"{folder}: holds a run already; continue it with --train.resume true, replace it with --train.overwrite "
            "true, or name another --train.output_dir"
        )
