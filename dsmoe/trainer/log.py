"""The log of a run: log.jsonl, one JSON object a line, and accelerate's trackers."""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from dsmoe.files import write_text


class RunLog:
    """Appends lines to `<folder>/log.jsonl` in the main process and passes scalars on to the trackers."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.path = folder / "log.jsonl"
        self.accelerator = accelerator

    def rewind(self, step: int) -> None:
        """Drop lines after a step, left by a run that broke off after its last checkpoint."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        # a torn line may be cut inside a character, or hold zeros after a power failure
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and _step(line) <= step]
        if len(kept) < len(lines):
            write_text(self.path, "".join(kept))

    def sync(self) -> None:
        """Bring the lines so far to the disk: a checkpoint must not outlive them."""
        if self.path.exists():
            with self.path.open("a") as handle:
                os.fsync(handle.fileno())

    def write(self, line: dict[str, Any]) -> None:
        """Add one line; it has "step"."""
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(line) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log(dict(_scalars(line)), step=line["step"])


def _step(line: str) -> float:
    """The step of a line; infinity where it isn't whole."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _scalars(value: Any, name: str = ""):
    """Flatten nested dicts and short lists to "a/b/0" names."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return
    if isinstance(value, int | float):
        yield name, value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield from _scalars(item, f"{name}/{key}" if name else str(key))
