"""What a record of budgets holds of a study's runs: rows of models whose folders are gone stay in it."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.records import check_record_folder
from dsmoe.study.kept import digest
from dsmoe.study.spec import Study, StudyRun


@dataclass(frozen=True)
class KeptBudgets:
    """Rows of a record.

    Args:
        rows: by arm and seed, as `dsmoe.report.budgets` wrote them.
        texts: descriptions of the samples that they were judged on.
    """

    rows: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)

    def check_texts(self, record: Path, texts: Mapping[str, Any]) -> None:
        """Raises UserError where rows stand beside such as are judged on other samples."""
        if self.rows and self.texts != texts:
            raise UserError(
                f"--record {record}: holds {len(self.rows)} run(s) that are not finished in --output and were judged on "
                "other samples; give --data, --tokens, --calibration-tokens and --sequence-length as there, or name "
                "another folder"
            )


def kept_budgets(study: Study, record: Path | None, finished: Collection[StudyRun]) -> KeptBudgets:
    """The rows of a record whose runs are runs of the study, of the same settings, and not finished here.

    Args:
        study: the study.
        record: a record's folder, which need not exist; None: no record, and nothing is kept.
        finished: runs whose folders are here, which will be judged anew.

    Raises:
        UserError: the folder holds anything but a record of budgets, or runs that would be lost.
    """
    if record is None or not check_record_folder(record):
        return KeptBudgets()
    path = record / "results.json"
    results: Any = read_json(path) if path.exists() else None
    held: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    try:
        for row in results["runs"]:
            held.setdefault((row["arm"], row["seed"]), []).append(row)
    except (KeyError, TypeError):
        raise UserError(
            f"--record {record}: holds a record, but not of this command; name another folder"
        ) from None
    here = {(run.point, run.seed) for run in finished}
    of_study = {(run.point, run.seed): run for run in study.runs}
    kept, lost = {}, []
    for place, rows in sorted(held.items()):
        if place in here:
            continue
        run = of_study.get(place)
        if run is not None and all(row.get("digest") == digest(study, run) for row in rows):
            kept[place] = rows
        else:
            lost.append(place)
    if lost:
        arm, seed = lost[0]
        raise UserError(
            f"--record {record}: holds {len(lost)} run(s) that are not finished in --output and not of the study's "
            f"settings, the first seed {seed} of {arm}; finish them, name another folder, or remove the old record"
        )
    return KeptBudgets(kept, results.get("texts", {}))
