"""A record is a folder under `eval/records/`: record.json, README.md, and the files that back it."""

import argparse
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe.environment import describe
from dsmoe.errors import UserError
from dsmoe.files import check_new_folder, new_folder, sha256, write_json, write_text

CONCLUSION = "conclusion.md"
RECORD = "record.json"


def check_record_folder(folder: str | Path, *, overwrite: bool = True) -> bool:
    """Refuse a folder that no record may replace; for commands that work long before they write theirs.

    Args:
        folder: where a record will be written.
        overwrite: an existing record may be replaced.

    Returns:
        Whether a record stands there now.

    Raises:
        UserError: a file stands there, a folder with anything else than a record in it, the current folder, or a record
            that may not be replaced.
    """
    folder = Path(folder)
    if not folder.exists():
        above = next(path for path in folder.absolute().parents if path.exists())
        if not above.is_dir():
            raise UserError(f"{folder}: {above} is a file, and no folder can be made in it; name another one")
        return False
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, and the record is a folder; name another one")
    check_new_folder(folder, overwrite=True)
    inside = list(folder.iterdir())
    if not inside:
        return False
    strange = sorted(path.name for path in inside if path.is_dir())
    if strange or not (folder / RECORD).is_file():
        reason = f"it holds a folder, {strange[0]}" if strange else f"it has no {RECORD}"
        raise UserError(f"{folder}: is no record ({reason}), and is not replaced; name a new or empty folder")
    if not overwrite:
        raise UserError(f"{folder}: the record exists; name another folder or pass --overwrite to replace it")
    return True


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
        UserError: a file is missing, or as `check_record_folder`.
    """
    check_record_folder(folder, overwrite=overwrite)
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such file, and the record needs it")
    with new_folder(folder, overwrite=overwrite) as beside:
        for path in files:
            shutil.copy(path, beside / path.name)
        write_json(
            beside / RECORD,
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


def read_conclusion(folder: str | Path, given: Path | None) -> str:
    """The conclusion that a record will have, "" where there is none.

    Args:
        folder: where the record will be written.
        given: a text file; None: the conclusion of the record which is replaced, where there is one.

    Raises:
        UserError: the file is not there (one that is given), or is no text in UTF-8 that can be read.
    """
    path = given or Path(folder) / CONCLUSION
    if not given and not path.exists():
        return ""
    option = "--conclusion " if given else ""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{option}{path}: can't be read ({error.strerror}); give a text file") from None
    except UnicodeDecodeError:
        raise UserError(f"{option}{path}: is no text in UTF-8; give a text file") from None


def write_concluded_record(
    folder: str | Path, *, given: Path | None, tables: str, files: Sequence[Path], **details: Any
) -> None:
    """Write a record whose tables stand below a conclusion written by hand, which survives when it is made again.

    Args:
        folder: `eval/records/<name>`.
        given: as in `read_conclusion`.
        tables: Markdown.
        files: as for `write_record`.
        details: the other arguments of `write_record`.

    Raises:
        UserError: as `read_conclusion` and `write_record`.
    """
    text = read_conclusion(folder, given)
    with tempfile.TemporaryDirectory() as name:
        conclusion = Path(name) / CONCLUSION
        write_text(conclusion, text)
        write_record(
            folder, conclusion=f"{text.strip()}\n\n{tables}".strip(), files=[*files, conclusion], **details
        )


def add_record_arguments(
    parser: argparse.ArgumentParser, option: str = "--record", default: Path | None = None
) -> None:
    """Add the options of a command that writes such a record: where, --overwrite, --conclusion.

    Args:
        parser: of the command.
        option: name of the option for the folder.
        default: the folder; None: no record unless asked for.
    """
    text = (
        "also write a record" if default is None else f"the record (default: {default.name}, in eval/records)"
    )
    parser.add_argument(option, type=Path, default=default, metavar="FOLDER", help=text)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing record")
    parser.add_argument(
        "--conclusion", type=Path, metavar="MD",
        help="text to put above the tables (default: the conclusion.md of the record that is replaced)",
    )  # fmt: skip
