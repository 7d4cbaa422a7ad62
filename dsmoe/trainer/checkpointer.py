"""When a run writes its checkpoints, and how it starts from one."""

import dataclasses
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dsmoe.checkpoint import clean_leftovers, discard, load_checkpoint, newest_intact, save_checkpoint
from dsmoe.config.run import RunConfig
from dsmoe.errors import UserError
from dsmoe.files import write_json, write_text
from dsmoe.lock import FolderLock
from dsmoe.trainer.dense_stage import find_stage, is_last_dense_step, stage_folder, take_log
from dsmoe.trainer.differences import POSITION, changed, differences, with_defaults
from dsmoe.trainer.log import RunLog
from dsmoe.trainer.parallel import Replicated, Tensors
from dsmoe.trainer.signals import SIGNALS, Stopped, StopSignals
from dsmoe.trainer.state import LoopState
from dsmoe.trainer.together import on_main


@dataclass
class Checkpointer:
    """Saves and restores one run.

    Attributes:
        config: of the run.
        seed: of the run.
        folder: of the run.
        accelerator: of the run.
        model: unwrapped.
        optimizer: unwrapped.
        parallel: gathers and spreads their tensors.
        state: what else changes from step to step.
        log: rewound to the checkpoint that is resumed.
        environment: what results depend on besides the configuration; a difference is told.
        tokenizer_dir: its tokenizer goes into every checkpoint.
        signals: a signal is answered with a checkpoint.
    """

    config: RunConfig
    seed: int
    folder: Path
    accelerator: Accelerator
    model: Any
    optimizer: torch.optim.Optimizer
    parallel: Replicated
    state: LoopState
    log: RunLog
    environment: dict[str, Any]
    tokenizer_dir: Path | None
    signals: StopSignals
    _saved_step: int = 0
    _saved_at: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Resume from the newest intact checkpoint, or clear the folder for a fresh run, which may start from a stage.

        Raises:
            UserError: there is something to resume, and it is damaged or of another run.
        """
        checkpoint = on_main(self.accelerator, self._find_or_clear)
        if checkpoint is not None:
            self._resume(checkpoint)
        if self.accelerator.is_main_process:
            write_json(self.folder / "config.json", dataclasses.asdict(self.config))
            write_json(self.folder / "environment.json", self.environment)
        self.accelerator.wait_for_everyone()
        self._saved_at = time.monotonic()

    def after_step(self) -> None:
        """Write a checkpoint where one is due.

        Raises:
            Stopped: a signal came; the checkpoint is written.
            UserError: the disk is full.
        """
        train, step = self.config.train, self.state.step
        if is_last_dense_step(self.config, step):
            self._keep_stage()
        late, number = self._agreed(time.monotonic() - self._saved_at > train.save_every_minutes * 60)
        if number:
            self.save()
            raise Stopped(number, step)
        due = bool(train.save_every_steps) and step % train.save_every_steps == 0
        if (due or late) and step < self.config.total_steps:
            self.save()

    def save(self) -> None:
        """Write a checkpoint of the present step, unless there is one.

        Raises:
            UserError: the disk is full.
        """
        if self._saved_step == self.state.step:
            return
        self._save_in(self.folder)
        self._saved_step, self._saved_at = self.state.step, time.monotonic()

    def _keep_stage(self) -> None:
        """Write the checkpoint of the last dense step for other runs, unless there is one or one of them is at it."""
        folder = stage_folder(self.config, self.seed)
        if folder is None:
            return
        with ExitStack() as held:
            if on_main(self.accelerator, lambda: self._begin_stage(folder, held)):
                self._save_in(folder)

    def _begin_stage(self, folder: Path, held: ExitStack) -> bool:
        """Lock the stage's folder and give it its log; False where there is nothing to write."""
        try:
            held.enter_context(FolderLock(folder, "train without its dense stage"))
        except UserError as error:
            print(f"the dense stage is left to another run ({error})", file=sys.stderr)
            return False
        if self._stage() is not None:
            return False
        clean_leftovers([folder, folder / "checkpoints"])
        # the log first: the checkpoint is what makes it a stage, also for a run that is killed between the two
        if self.log.path.exists():
            write_text(folder / "log.jsonl", self.log.path.read_text(encoding="utf-8"))
        return True

    def _save_in(self, folder: Path) -> None:
        weights = self.parallel.weights(self.model)
        moments = self.parallel.moments(self.optimizer)
        on_main(self.accelerator, lambda: self._write(folder, weights, moments))

    def _agreed(self, late: bool) -> tuple[bool, int]:
        """Whether the main process finds it late, and a signal that any process received (0: none), told to all."""
        flags = [float(late and self.accelerator.is_main_process)]
        flags += [float(self.signals.received == number) for number in SIGNALS]
        if self.accelerator.num_processes > 1:
            told = torch.tensor(flags, device=self.accelerator.device)
            flags = self.accelerator.reduce(told, reduction="sum").tolist()
        return flags[0] > 0, next((number for number, flag in zip(SIGNALS, flags[1:]) if flag > 0), 0)

    def _stage(self) -> Path | None:
        return find_stage(self.config, self.seed, self.environment["corpus"])

    def _write(self, folder: Path, weights: Tensors | None, moments: Tensors) -> None:
        record = {
            **self.state.record(),
            "samples": self.state.step * self.config.train.global_batch_size,
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "environment": self.environment,
        }
        self.log.sync()
        save_checkpoint(
            folder, self.model, self.optimizer, record, self.state.tensors(), self.tokenizer_dir,
            self.config.train.keep_last, weights, moments,
        )  # fmt: skip

    def _find_or_clear(self) -> Path | None:
        train = self.config.train
        checkpoint = None
        if train.resume:
            try:
                checkpoint = newest_intact(self.folder)
            except UserError as error:
                if not train.overwrite:
                    raise
                print(f"warning: {error}; starting afresh, as --train.overwrite says", file=sys.stderr)
        if checkpoint is None:
            stage = self._stage()
            # nothing to resume, or --train.overwrite: what is left here would later be taken for this run's
            (self.folder / "summary.json").unlink(missing_ok=True)
            for name in ("checkpoints", "final"):
                discard(self.folder / name)
            (self.folder / "log.jsonl").unlink(missing_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            # by this a folder is known as a run's
            write_json(self.folder / "environment.json", self.environment)
            if stage is not None:
                take_log(stage, self.folder)
            return stage
        return checkpoint

    def _resume(self, checkpoint: Path) -> None:
        with self.parallel.restoring(self.optimizer) as optimizer:
            record, tensors = load_checkpoint(
                checkpoint, self.model, optimizer, self.parallel.load_weights, self.parallel.part
            )
        if record["environment"]["corpus"] != self.environment["corpus"]:
            raise UserError(f"{checkpoint}: was trained on another token folder than {self.config.data.path}")
        self.state.load(record, tensors)
        self._saved_step = self.state.step
        for change in self._changes(checkpoint, record) if self._is_own(checkpoint) else ():
            self.accelerator.print(f"warning: {change} since {checkpoint.name}")
        for change in differences(record["environment"], self.environment):
            self.accelerator.print(f"warning: {change}: losses may differ in the last bits")
        self.log.rewind(self.state.step)
        self.accelerator.print(
            f"resuming {checkpoint.name}" if self._is_own(checkpoint) else f"starting from {checkpoint}"
        )

    def _is_own(self, checkpoint: Path) -> bool:
        """Whether it is of this run, and not of a stage that `find_stage` found fit."""
        return checkpoint.is_relative_to(self.folder)

    def _changes(self, checkpoint: Path, record: dict[str, Any]) -> list[str]:
        """What differs between the run that is resumed and this one; refuses what can't be gone on with."""
        advice = "give what the run began with, or begin another in an --train.output_dir of its own"
        if record["seed"] != self.seed:
            raise UserError(
                f"{checkpoint}: is of seed {record['seed']}, and train.seeds is {self.seed}; {advice}"
            )
        if record["step"] > self.config.total_steps:
            raise UserError(
                f"{checkpoint}: has taken {record['step']} steps, and train.total_tokens "
                f"{self.config.train.total_tokens} gives {self.config.total_steps}; {advice}"
            )
        changes = changed(with_defaults(record["config"]), dataclasses.asdict(self.config))
        # a mapping, such as data.weights, differs in its entries
        moved = [
            change
            for change in changes
            if change.startswith(tuple(f"{name}{end}" for name in POSITION for end in " ."))
        ]
        if moved:
            raise UserError(f"{checkpoint}: {moved[0]}, so the text would not go on where it was; {advice}")
        return changes
