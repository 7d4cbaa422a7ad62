"""What records already hold: a finished run whose folder is gone is not trained a second time.

A study's own record comes first. Runs that it lacks may stand in the records of other studies that its YAML names
(`also`), where settings, recipe, seed and text are the same; such a row says `from` which record it is.
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.records import check_record_folder
from dsmoe.study.launcher import corpus_of, identity, without_places
from dsmoe.study.spec import Study, StudyRun


@dataclass(frozen=True)
class Kept:
    """Finished runs of a record.

    Args:
        rows: by the run's name, as `dsmoe.study.tabulate.collect` made them.
        environment: of the record's results.
        logs: the lines of its logs.jsonl, by the run's name.
        others: names of the record's other runs: of other settings, of another text, not known of which, or of no run
            that the study names.
    """

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    logs: dict[str, list[str]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def lost(self, study: Study, finished: Collection[str]) -> list[str]:
        """Runs of the record that a record of the `finished` ones in its place would lose.

        Runs that the study doesn't name any more may give way to at least as many new ones.
        """
        gone = [name for name in self.others if name not in finished]
        if len(finished) < len(self.rows) + len(self.others):
            return gone
        known = {run.name for run in study.runs}
        return [name for name in gone if name in known]


def digest(study: Study, run: StudyRun, name: str | None = None) -> str:
    """SHA-256 of what a run's result depends on, but for places, seed and corpus; as a run of the study `name`."""
    parts = {**without_places(identity(study, run)), "study": name or study.name}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_kept(study: Study, record: Path | None) -> Kept:
    """The runs of a record that are runs of this study, of these settings and of this text; then those of `study.also`.

    Args:
        study: the study.
        record: a record's folder, which need not exist; None: no record, and nothing is kept.

    Raises:
        UserError: the folder holds anything but a record of this study, or one of `study.also` no study's record.
    """
    if record is None:
        return Kept()
    kept = _own(study, record) if check_record_folder(record) else Kept()
    for other in study.also:
        kept = _with_others(kept, study, other)
    return kept


def _own(study: Study, record: Path) -> Kept:
    results = _results(record)
    if results["name"] != study.name:
        raise UserError(
            f"{record}: holds the record of the study {results['name']!r}, and this is {study.name!r}; "
            "name another folder"
        )
    of_name = {run.name: run for run in study.runs}
    rows = {}
    for row in results["runs"]:
        run = of_name.get(row["name"])
        if run is not None and row.get("digest") == digest(study, run) and _same_text(study, run, row):
            rows[run.name] = row
    others = tuple(row["name"] for row in results["runs"] if row["name"] not in rows)
    return Kept(rows, results["environment"], _read_logs(record / "logs.jsonl", rows), others)


def _with_others(kept: Kept, study: Study, record: Path) -> Kept:
    """`kept` with the runs that it lacks and that the record of another study has."""
    results = _results(record)
    found = {}
    for run in study.runs:
        if run.name in kept.rows or run.name in kept.others:
            continue
        wanted = digest(study, run, results["name"])
        for row in results["runs"]:
            if row.get("digest") == wanted and row["seed"] == run.seed and _same_text(study, run, row):
                found[run.name] = row
    lines = _read_logs(record / "logs.jsonl", {row["name"] for row in found.values()})
    logs = {
        name: [json.dumps({**json.loads(line), "run": name}) + "\n" for line in lines[row["name"]]]
        for name, row in found.items()
    }
    rows = {
        run.name: {
            **found[run.name], "name": run.name, "group": run.group, "labels": run.labels,
            "digest": digest(study, run), "from": {"study": results["name"], "run": found[run.name]["name"]},
        }
        for run in study.runs
        if run.name in found
    }  # fmt: skip
    return replace(
        kept,
        rows={**kept.rows, **rows},
        environment=kept.environment or (results["environment"] if rows else {}),
        logs={**kept.logs, **logs},
    )


def _same_text(study: Study, run: StudyRun, row: dict[str, Any]) -> bool:
    # where the text isn't on this machine, nothing else could be read
    return corpus_of(study, run) in (None, row.get("corpus"))


def _results(record: Path) -> dict[str, Any]:
    path = record / "results.json"
    results: Any = read_json(path) if path.exists() else None
    if not _is_of_a_study(results):
        raise UserError(
            f"{record}: holds a record, but not of a study of train/study.py; name another folder"
        )
    return results


def _is_of_a_study(results: Any) -> bool:
    if not isinstance(results, dict) or not isinstance(results.get("runs"), list):
        return False
    rows = all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in results["runs"])
    return rows and isinstance(results.get("name"), str) and isinstance(results.get("environment"), dict)


def _read_logs(path: Path, names: Collection[str]) -> dict[str, list[str]]:
    """The lines of the runs of these names."""
    logs: dict[str, list[str]] = {name: [] for name in names}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            name = json.loads(line)["run"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} is no log line of a run; the record is damaged") from None
        if name in logs:
            logs[name].append(line + "\n")
    return logs
