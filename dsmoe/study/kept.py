"""What a study's record already holds: a finished run whose folder is gone is not trained a second time."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe.data.corpus import META
from dsmoe.files import read_json, sha256
from dsmoe.study.launcher import identity
from dsmoe.study.spec import Study, StudyRun

# where the text lies differs between machines; the corpus itself is compared by its fingerprint
PLACES = ("data.path",)


@dataclass(frozen=True)
class Kept:
    """Finished runs of a record.

    Args:
        rows: by the run's name, as `dsmoe.study.tabulate.collect` made them.
        environment: of the record's results.
        logs: the lines of its logs.jsonl, by the run's name.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)


def digest(study: Study, run: StudyRun) -> str:
    """SHA-256 of what a run's result depends on, but for places and the corpus."""
    parts = identity(study, run)
    parts["settings"] = {name: value for name, value in run.settings.items() if name not in PLACES}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_kept(study: Study, record: Path | None) -> Kept:
    """The runs of a record that are runs of this study, of these settings and of this text.

    Args:
        study: the study.
        record: a record's folder, which need not exist; None: no record.
    """
    if record is None or not (record / "results.json").exists():
        return Kept()
    results = read_json(record / "results.json")
    of_name = {run.name: run for run in study.runs}
    rows = {}
    for row in results["runs"]:
        run = of_name.get(row["name"])
        if run is not None and row.get("digest") == digest(study, run) and _same_text(row, run.settings):
            rows[run.name] = row
    logs: dict[str, list[str]] = {name: [] for name in rows}
    path = record / "logs.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        name = json.loads(line)["run"]
        if name in logs:
            logs[name].append(line + "\n")
    return Kept(rows, results["environment"], logs)


def _same_text(row: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    """Whether the row's corpus is the one that the run would read; where there is none, nothing else could be read."""
    path = Path(settings.get("data.path", "")) / META
    return not path.is_file() or row.get("corpus") == sha256(path)
