"""Starting processes: the accelerator, and the guard against fewer processes than were asked for."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from dsmoe.allocator import keep_freed_memory
from dsmoe.config.run import RunConfig, TrainSettings
from dsmoe.environment import tell_deepspeed
from dsmoe.errors import UserError
from dsmoe.trainer.bf16_speed import bf16_note
from dsmoe.trainer.compiled import settle_compile
from dsmoe.trainer.zero_setup import (
    STAGES,
    flag,
    keep_from_transformers,
    launcher_set_aside,
    settle_sharding,
    zero_plugin,
)


def start(config: RunConfig) -> Accelerator:
    """Make the accelerator of a run.

    Args:
        config: of the run; `train.sharding` and `train.compile` become the launcher's where that asks for DeepSpeed
            or for torch.compile.

    Raises:
        UserError: a tracker isn't installed, fewer processes came up than were asked for, or launcher and run
            contradict each other.
    """
    _check_trackers(config.train.trackers)
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    on_cpu = not torch.cuda.is_available() or flag("ACCELERATE_USE_CPU")
    # a single process has no group; naming a backend would make accelerate look for one
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    settle_sharding(config.train)
    settle_compile(config.train)
    tell_deepspeed()
    if on_cpu:
        keep_freed_memory()
    with launcher_set_aside():
        plugin = None
        if num_processes > 1 and config.train.sharding in STAGES:
            plugin = zero_plugin(config, num_processes, on_cpu)
        try:
            accelerator = Accelerator(
                # accelerate does without DeepSpeed where it is told that there is a CPU only
                cpu=on_cpu and plugin is None,
                mixed_precision="bf16" if config.train.precision == "bf16" and plugin is None else "no",
                log_with=config.train.trackers or None,
                project_dir=config.train.output_dir,
                deepspeed_plugin=plugin,
                kwargs_handlers=[_process_group(on_cpu)] if num_processes > 1 else [],
            )
        except ValueError as error:
            # WORLD_SIZE without the rest of a launcher's variables, an unknown tracker, ...
            raise UserError(f"the processes can't be set up ({' '.join(str(error).split())})") from error
    if plugin is not None:
        keep_from_transformers()
    check_processes(accelerator.num_processes, config.train.num_processes)
    idle = (os.cpu_count() or 1) - torch.get_num_threads() * accelerator.num_processes
    if on_cpu and idle > 0 and not config.train.num_threads:
        accelerator.print(
            f"note: {torch.get_num_threads()} thread(s) a process leave {idle} core(s) idle; `accelerate launch` starts "
            "with one thread unless told --num_cpu_threads_per_process (or --train.num_threads) otherwise"
        )
    note = bf16_note(config.train.precision, on_cpu)
    if note:
        accelerator.print(note)
    return accelerator


def _check_trackers(names: Sequence[str]) -> None:
    """accelerate trains on without a tracker whose package isn't there."""
    there = [str(tracker.value) for tracker in get_available_trackers()]
    for name in names:
        if name in LOGGER_TYPE_TO_CLASS and name not in there:
            raise UserError(
                f"train.trackers: the package of {name!r} isn't installed; install it, or leave the tracker out "
                "(log.jsonl is written in any case)"
            )


def _process_group(on_cpu: bool) -> InitProcessGroupKwargs:
    # the others wait while the main process writes or checks a checkpoint; NCCL's ten minutes can be too few
    patience = timedelta(hours=2)
    return InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=patience)


def count_micro_batches(train: TrainSettings, num_processes: int) -> int:
    """Micro-batches that each process reads in a step.

    Raises:
        UserError: the global batch can't be divided so.
    """
    per_round = train.micro_batch_size * num_processes
    if train.global_batch_size % per_round == 0:
        return train.global_batch_size // per_round
    share, rest = divmod(train.global_batch_size, num_processes)
    advice = f"raise it to a multiple of {num_processes}"
    if not rest:
        fits = max(size for size in range(1, min(share, train.micro_batch_size) + 1) if share % size == 0)
        advice = f"with train.micro_batch_size {fits} it is"
    raise UserError(
        f"train.global_batch_size {train.global_batch_size} is not a multiple of micro_batch_size "
        f"{train.micro_batch_size} times {num_processes} process(es); {advice}"
    )


def start_trackers(config: RunConfig, seed: int, accelerator: Accelerator) -> None:
    """Trackers of a seed's run; of several seeds each has its own, since in one of theirs steps can't begin again.

    What accelerate calls a project is the name of a run to all but wandb, whose runs to compare share one
    (WANDB_PROJECT, or "dsmoe") and go on under the same id where they are resumed.
    """
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers.clear()  # accelerate would add to them
    if not config.train.trackers:
        return
    name = config.name if len(config.train.seeds) == 1 else f"{config.name}-seed-{seed}"
    if list(config.train.trackers) != ["wandb"]:
        accelerator.init_trackers(name)
        return
    place = f"{Path(config.train.output_dir).resolve()} {seed}"
    run = {"name": name, "id": hashlib.sha256(place.encode()).hexdigest()[:16], "resume": "allow"}
    project = os.environ.get("WANDB_PROJECT", "dsmoe")
    accelerator.init_trackers(project, config=asdict(config), init_kwargs={"wandb": run})


def finish(accelerator: Accelerator) -> None:
    """End trackers and the process group, after the models.

    A DistributedDataParallel that outlives the group destroys it while it holds Python's lock, and waits for threads of
    the group that may want that lock to free the last tensor they have sent: the process would hang, now and then.

    Args:
        accelerator: of the run; nothing but it holds the models that it has prepared.
    """
    # collects garbage too
    accelerator.free_memory()
    accelerator.end_training()


def check_processes(num_processes: int, asked: int | None) -> None:
    """Compare the processes that came up with those asked for by the config, torchrun or accelerate launch.

    `accelerate launch` with several CPU processes starts a single one and says nothing.

    Raises:
        UserError: they differ.
    """
    world = os.environ.get("WORLD_SIZE")
    for source, wanted in (
        ("train.num_processes", asked),
        ("WORLD_SIZE", int(world) if world else None),
        ("`accelerate launch --num_processes`", _asked_of_launcher()),
    ):
        if wanted is not None and wanted != num_processes:
            raise UserError(
                f"{num_processes} process(es) came up, but {source} asks for {wanted}; on CPU start them with "
                f"`torchrun --nproc_per_node {wanted} train/pretrain.py ...`"
            )


def _asked_of_launcher() -> int | None:
    """The --num_processes of an `accelerate launch` that is our parent, where the system tells (Linux)."""
    command = Path(f"/proc/{os.getppid()}/cmdline")
    try:
        words = command.read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return None
    if not any(
        word.endswith(("accelerate", "accelerate-launch")) or "accelerate.commands" in word for word in words
    ):
        return None
    for index, word in enumerate(words):
        if word in ("--num_processes", "--num-processes") and index + 1 < len(words):
            return int(words[index + 1]) if words[index + 1].isdigit() else None
        if word.startswith(("--num_processes=", "--num-processes=")):
            value = word.split("=", 1)[1]
            return int(value) if value.isdigit() else None
    return None
