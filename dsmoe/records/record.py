"""A record is a folder under `eval/records/`: record.json, README.md, and the files that back it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.environment import describe
from dsmoe.errors import UserError
from dsmoe.files import new_folder, sha256, write_json, write_text

CONCLUSION = "conclusion.md"


def conclusion_for(record: str | Path, given: Path | None, folder: Path) -> Path:
    """A conclusion written by hand, as a file of the record: the one given, or that of the record which is replaced.

    Args:
        record: the record to be written.
        given: a text file, or None.
        folder: where to put `conclusion.md`, for `write_record` to copy.

    Raises:
        UserError: the file given is not there.
    """
    kept = given or Path(record) / CONCLUSION
    if given and not kept.is_file():
        raise UserError(f"--conclusion {kept}: no such file")
    write_text(folder / CONCLUSION, kept.read_text(encoding="utf-8") if kept.is_file() else "")
    return folder / CONCLUSION


def write_record(
    folder: str | Path,
    *,
    title: str,
    command: str,
    conclusion: str,
    files: Sequence[Path],
    details: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a record.

    Args:
        folder: `eval/records/<name>`.
        title: one line that says what was measured.
        command: the command that makes it again.
        conclusion: a few sentences, or a table; goes into README.md.
        files: raw results and plots to copy in.
        details: further JSON-able fields (seeds, data with checksums, resolved configs).
        overwrite: replace an existing record.

    Raises:
        UserError: a file is missing, or the record exists and `overwrite` is false.
    """
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file, and the record needs it")
    with new_folder(folder, overwrite=overwrite) as beside:
        for path in files:
            shutil.copy(path, beside / path.name)
        write_json(
            beside / "record.json",
            {
                "title": title,
                "command": command,
                **describe(),
                **(details or {}),
                "files": {path.name: sha256(path) for path in files},
            },
        )
        plots = "\n".join(f"![{path.stem}]({path.name})" for path in files if path.suffix == ".png")
        raw = ", ".join(f"`{path.name}`" for path in files if path.suffix != ".png")
        write_text(
            beside / "README.md",
            f"# {title}\n\nMade again by:\n\n```bash\n{command}\n```\n\n{conclusion}\n\n"
            f"Raw numbers: {raw}; configuration, versions and hardware: `record.json`.\n\n{plots}\n",
        )
