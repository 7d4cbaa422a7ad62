"""The results file of `eval/score.py`, written after each model, and its sidecar with per-question outcomes.

`results.json` holds what a reader wants; `results.questions.json` beside it holds one digit per question and
model, from which models are paired, also with those of an earlier run.
"""

import hashlib
import math
import tempfile
from pathlib import Path
from typing import Any

from dsmoe import files
from dsmoe.errors import UserError
from dsmoe.evaluation.comparison import compare

Row = dict[str, Any]


class ResultsFile:
    """Finished models of a scoring run.

    Args:
        path: the JSON file.
        settings: what all models of the file must share: tasks, limit, dtype and so on.
        header: further top-level fields ("versions", "hardware", "seeds").
        resume: keep the models that the file holds already.

    Raises:
        UserError: the files can't be written there, or the file to resume is none of these or was made with other
            settings.
    """

    def __init__(self, path: str | Path, settings: Row, header: Row, *, resume: bool = False) -> None:
        self.path = Path(path)
        self._check_place()
        self.settings = settings
        self.header = header
        self.task_versions: Row = {}
        self._rows: dict[str, Row] = {}
        self._questions: Row = {}
        if resume and self.path.exists() and self.sidecar.exists():
            self._read()

    @property
    def sidecar(self) -> Path:
        """File with the per-question outcomes."""
        return self.path.with_name(f"{self.path.stem}.questions.json")

    @property
    def models(self) -> list[Row]:
        """Rows of the finished models."""
        return list(self._rows.values())

    def _check_place(self) -> None:
        """Refuse a place that can't be written before hours of scoring rather than after."""
        for path in (self.path, self.sidecar):
            if path.is_dir():
                raise UserError(f"{path}: is a folder; results are a file, such as {path / 'results.json'}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); name a file in a folder that can"
            ) from None

    def _read(self) -> None:
        try:
            self._take(files.read_json(self.path), files.read_json(self.sidecar))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: not results of score.py with their {self.sidecar.name} "
                f"({type(error).__name__}: {error}); name another --output, or leave --resume out to replace it"
            ) from None

    def _take(self, found: Row, questions: Row) -> None:
        for key, value in self.settings.items():
            if found["settings"].get(key) != value:
                raise UserError(
                    f"{self.path}: made with {key} {found['settings'].get(key)!r}, not {value!r}; "
                    "name another --output, or leave --resume out to replace it"
                )
        if not isinstance(questions, dict):
            raise TypeError(f"the outcomes are {questions!r:.40}")
        self._questions = questions
        self._rows = {row["name"]: row for row in found["models"] if row["name"] in questions}
        self.task_versions = dict(found["task_versions"])
        # what the rest relies on: which model a row is of, and outcomes that can be paired
        for row in self.models:
            if missing := {"path", "fingerprint"} - row.keys():
                raise KeyError(*sorted(missing))
        paired(questions, list(self._rows))

    def has(self, name: str, path: str) -> bool:
        """Whether a model of that name is finished, from the same path with the same files."""
        row = self._rows.get(name)
        return row is not None and row["path"] == path and row["fingerprint"] == fingerprint(path)

    def add(self, row: Row, questions: Row, task_versions: Row) -> None:
        """Add (or replace) a finished model and write both files."""
        self._rows[row["name"]] = row
        self._questions[row["name"]] = questions
        self.task_versions |= task_versions
        # the sidecar first: a row without its outcomes would count as finished
        files.write_json(self.sidecar, self._questions)
        files.write_json(self.path, self.as_dict())

    def as_dict(self) -> Row:
        """What the file holds."""
        return {
            "models": self.models,
            "paired": paired(self._questions, [row["name"] for row in self.models]),
            "limit": self.settings.get("limit"),
            "task_versions": self.task_versions,
            "settings": self.settings,
            **self.header,
        }


def paired(questions: Row, names: list[str]) -> list[Row]:
    """Paired differences in accuracy (first minus second) of every two models.

    Args:
        questions: model to task to outcomes, as `harness.score_model` gives them.
        names: the models, in order.

    Returns:
        One dict per pair: {"a", "b", task: {"difference", "stderr", "tie"}, ..., "average": {...}}; "stderr"
        is null where it is not defined (one question).
    """
    rows = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            row: Row = {"a": a, "b": b}
            for task, value in compare(questions[a], questions[b]).items():
                stderr = value.stderr if math.isfinite(value.stderr) else None
                row[task] = {"difference": value.difference, "stderr": stderr, "tie": value.tie}
            rows.append(row)
    return rows


def fingerprint(path: str | Path) -> str | None:
    """Digest of names, sizes and times of a folder's files; None for a Hub id.

    It changes when a model is written anew.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    entries = []
    for file in sorted(folder.iterdir()):
        if file.is_file():
            stat = file.stat()
            entries.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()
