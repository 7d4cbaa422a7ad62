"""A manifest of a checkpoint's files, by which damage is found: `manifest.json`, written last.

It holds {"files": {name: {"size": bytes, "sha256": digits}}}. A folder without one is not a whole checkpoint.
"""

from pathlib import Path

from dsmoe.errors import UserError
from dsmoe.files import read_json, sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """List what is in a finished folder."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    write_json(folder / MANIFEST, {"files": files})


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
