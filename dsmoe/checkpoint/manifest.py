"""A manifest of a checkpoint's files, by which damage is found: `manifest.json`, written last.

It holds {"files": {name: {"size": bytes, "sha256": digits}}}. A folder without one is not a whole checkpoint.
"""

import os
from pathlib import Path

from dsmoe.errors import UserError
from dsmoe.files import read_json, sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Bring a finished folder to the disk (fsync of every file, then of the folder) and list what is in it."""
    files = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"files": files})
    sync_folder(folder)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: the first bad file and how ("FILE: truncated ..."); None if it is intact."""
    try:
        listed = read_json(folder / MANIFEST)["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except UserError:
        state = "unreadable" if (folder / MANIFEST).exists() else "missing"
        return f"{folder / MANIFEST}: {state}"
    except (KeyError, TypeError, AttributeError, OSError):
        return f"{folder / MANIFEST}: changed (not a manifest any more)"
    # sizes tell most of it in no time
    for name, (size, _) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        found = path.stat().st_size
        if found != size:
            change = "truncated" if found < size else "changed"
            return f"{path}: {change} ({found:,} bytes, and {size:,} were written)"
    for name, (_, digits) in expected.items():
        try:
            if sha256(folder / name) != digits:
                return f"{folder / name}: changed (its SHA-256 is not the one that was written)"
        except OSError as error:
            return f"{folder / name}: unreadable ({error.strerror})"
    return None


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, on systems where a folder can be opened for that."""
    try:
        _sync(folder)
    except (PermissionError, IsADirectoryError):  # Windows
        return


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
