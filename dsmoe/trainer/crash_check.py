"""What the crash test knows about a run that is killed again and again, and which promises its folder breaks."""

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from dsmoe.checkpoint.newest import pointed_to
from dsmoe.trainer.crash_child import digests


@dataclass
class Reference:
    """The run that was left alone.

    Attributes:
        log: lines of its log.jsonl without speeds.
        weights: SHA-256 of its final weights.
        seconds: how long it took.
        operations: operations on its files.
        modules: what it had imported at its end.
    """

    log: list[dict[str, Any]]
    weights: str
    seconds: float
    operations: int
    modules: list[str]


@dataclass
class Faults:
    """Promises that were broken, each with what was found."""

    lost: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    resume_mismatches: list[str] = field(default_factory=list)

    def count(self) -> int:
        """All of them."""
        return len(self.lost) + len(self.corrupt) + len(self.resume_mismatches)


@dataclass
class WatchedRun:
    """One run, from its first process to the one that finishes it.

    Attributes:
        folder: of the run.
        journal: what its processes noted.
        reference: the run that was left alone.
        faults: gets what is wrong.
        complete: digests of the files of every checkpoint that was completed, by step.
        damaged: what the test has damaged, by step: the name that a warning must hold, and digests of what it left.
    """

    folder: Path
    journal: Path
    reference: Reference
    faults: Faults
    complete: dict[int, dict[str, str]] = field(default_factory=dict)
    damaged: dict[int, tuple[str, dict[str, str]]] = field(default_factory=dict)
    _read: int = 0

    def check(self) -> None:
        """Look at what the last process has done and left."""
        lines = self.journal.read_text(encoding="utf-8").splitlines() if self.journal.exists() else []
        for line in lines[self._read :]:
            self._follow(json.loads(line))
        self._read = len(lines)
        # a process may have been killed after it wrote one anew and before it noted that
        self.damaged = {
            step: entry for step, entry in self.damaged.items() if self._digests(step) == entry[1]
        }
        self._check_pointer()
        self._check_log()

    def check_end(self) -> None:
        """Compare the finished run with the one that was left alone."""
        self._check_log(whole=True)
        if weights_digest(self.folder) != self.reference.weights:
            self.faults.resume_mismatches.append(f"{self.folder}: other final weights")

    def damage(self, random: Random) -> str | None:
        """Damage the newest checkpoint, where another intact one stays; returns how."""
        folders = sorted((self.folder / "checkpoints").glob("step-*"))
        intact = [path for path in folders if int(path.name[-8:]) not in self.damaged]
        if len(intact) < 2:
            return None
        target, way = intact[-1], random.choice(("truncated", "flipped", "missing", "folder"))
        if way == "folder" and pointed_to(self.folder) != target.name:
            way = "missing"  # killed before the pointer moved: of the whole folder nothing would be left to tell of
        files = sorted(target.iterdir())
        if way == "flipped":
            # a bit in the white space of the manifest would do no harm
            files = [path for path in files if path.name != "manifest.json"]
        path = random.choice(files)
        if way == "folder":
            shutil.rmtree(target)
            path = target
        elif way == "missing":
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            place = random.randrange(len(content) - 2)  # without its last newline a JSON file is whole
            content[place] ^= 1 << random.randrange(8)
            path.write_bytes(content if way == "flipped" else content[:place])
        step = int(target.name[-8:])
        self.damaged[step] = (str(path.relative_to(self.folder)), self._digests(step))
        self.complete.pop(step, None)
        return f"{path}: {way}"

    def _follow(self, line: dict[str, Any]) -> None:
        if "saved" in line:
            self.complete[line["saved"]] = line["digests"]
            self.damaged.pop(line["saved"], None)
        elif "begun" in line:
            self._check_beginning(line["begun"])

    def _check_beginning(self, step: int) -> None:
        newest = max(self.complete, default=0)
        if step < newest:
            self.faults.lost.append(f"{self.folder}: went on from step {step}, though {newest} was complete")
        if step in self.damaged:
            self.faults.corrupt.append(f"{self.folder}: went on from step {step}, which is damaged")
        output = self.folder.with_name(f"{self.folder.name}.output").read_text(
            encoding="utf-8", errors="replace"
        )
        for damaged, (name, _) in self.damaged.items():
            if damaged > step and f"warning: {self.folder / name}: " not in output:
                self.faults.corrupt.append(f"{self.folder}: no warning names {name}")
        # what is newer has been passed over for good
        self.complete = {known: files for known, files in self.complete.items() if known <= step}

    def _check_pointer(self) -> None:
        pointer = self.folder / "checkpoints" / "latest.json"
        if not pointer.exists():
            return
        try:
            name = json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
        except (ValueError, KeyError) as error:
            self.faults.corrupt.append(f"{pointer}: unreadable ({error})")
            return
        target, step = pointer.with_name(name), int(name[-8:])
        if step in self.damaged:
            return
        found = self._digests(step)
        manifest = target / "manifest.json"
        listed = json.loads(manifest.read_text(encoding="utf-8"))["files"] if manifest.exists() else {}
        whole = listed and all(found.get(file) == entry["sha256"] for file, entry in listed.items())
        if not whole or found != self.complete.get(step, found):
            self.faults.corrupt.append(f"{pointer}: names {name}, which is not whole")

    def _digests(self, step: int) -> dict[str, str]:
        folder = self.folder / "checkpoints" / f"step-{step:08d}"
        return digests(folder) if folder.is_dir() else {}

    def _check_log(self, whole: bool = False) -> None:
        found = read_log(self.folder)
        expected = self.reference.log
        if found != (expected if whole else expected[: len(found)]):
            self.faults.resume_mismatches.append(f"{self.folder}: log.jsonl differs")


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's log, without speeds."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in found]


def weights_digest(folder: Path) -> str:
    """SHA-256 of a finished run's weights."""
    return hashlib.sha256((folder / "final" / "model.safetensors").read_bytes()).hexdigest()
