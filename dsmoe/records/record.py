"""A record is a folder under `eval/records/`: record.json, README.md, and the files that back it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.environment import describe
from dsmoe.errors import UserError
from dsmoe.files import new_folder, sha256, write_json, write_text


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
