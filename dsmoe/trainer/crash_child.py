"""The training process of the crash test: forked, watched, and killed at the moment that it is told."""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Python tells these before it does them; so a process can be killed between any two operations on its files
_FILE_EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.scandir",
    "os.truncate",
    "shutil.rmtree",
)


@dataclass
class Kill:
    """When to kill.

    Attributes:
        operation: before this operation on the run's files (from 1); 0: not so.
        after: seconds after the start; None: not so.
        writing: during this writing of a checkpoint since the start (from 1); 0: not so.
        delay: seconds after it began.
    """

    operation: int = 0
    after: float | None = None
    writing: int = 0
    delay: float = 0.0


def forked(work: Callable[[], int], output: Path) -> int:
    """Start a process that does some work, with stdout and stderr at the end of a file; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start_training(arguments: Sequence[str], folder: Path, journal: Path, kill: Kill) -> int:
    """Fork a training process.

    Args:
        arguments: of `train/pretrain.py`.
        folder: of the run.
        journal: gets a JSON line when training begins ("begun"), when a checkpoint is complete ("saved", with the
            digest of each file), and at a good end ("operations").
        kill: whether the process kills itself.

    Returns:
        Its id.
    """

    def work() -> int:
        operations = _watch_files(folder, kill.operation)
        _keep_journal(journal)
        from dsmoe.trainer.command import main

        status = main(arguments)
        if status == 0:
            _note(journal, {"operations": operations[0], "modules": sorted(sys.modules)})
        return status

    return forked(work, folder.with_name(f"{folder.name}.output"))


def wait(pid: int, folder: Path, kill: Kill) -> int:
    """Wait for a training process and kill it when `kill` says; returns its exit status, negative for a signal."""
    began, writings = time.monotonic(), 0
    seen: set[str] = set()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill.after is not None and time.monotonic() - began >= kill.after:
            os.kill(pid, signal.SIGKILL)
        if kill.writing and writings < kill.writing:
            new = _being_written(folder) - seen
            seen |= new
            writings += len(new)
            if writings >= kill.writing:
                time.sleep(kill.delay)
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005 if kill.writing else 0.002)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _being_written(folder: Path) -> set[str]:
    try:
        return {name for name in os.listdir(folder / "checkpoints") if name.startswith(".step-")}  # noqa: PTH208
    except OSError:
        return set()


def _watch_files(folder: Path, kill_at: int) -> list[int]:
    """Count operations on files of the run; the process kills itself before number `kill_at`."""
    inside, count = str(folder), [0]

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and details and str(details[0]).startswith(inside):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def _keep_journal(journal: Path) -> None:
    """Note what the trainer has done, from outside of its code."""
    from dsmoe.trainer import checkpointer

    begin, save_checkpoint = checkpointer.Checkpointer.begin, checkpointer.save_checkpoint

    def noted_begin(self: checkpointer.Checkpointer) -> None:
        begin(self)
        _note(journal, {"begun": self.state.step})

    def noted_save(*arguments: Any) -> Path:
        path = save_checkpoint(*arguments)
        _note(journal, {"saved": int(path.name[-8:]), "digests": digests(path)})
        return path

    checkpointer.Checkpointer.begin = noted_begin  # type: ignore[method-assign]
    checkpointer.save_checkpoint = noted_save  # type: ignore[assignment]


def _note(journal: Path, line: dict[str, Any]) -> None:
    handle = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(handle, (json.dumps(line) + "\n").encode())
    os.close(handle)
