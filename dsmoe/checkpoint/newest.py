"""Which checkpoint to go on from: the `latest.json` pointer, and the newest folder that is intact."""

import re
import sys
from pathlib import Path

from dsmoe.checkpoint.manifest import find_damage
from dsmoe.errors import UserError
from dsmoe.files import read_json, sync_names, write_json

POINTER = "latest.json"
_NAME = re.compile(r"step-(\d{8})$")


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Folders of checkpoints that were written to their end, oldest first; they may have been damaged since."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir())


def holds_checkpoints(run_dir: Path) -> bool:
    """Whether a run has left checkpoints, in whatever state."""
    return bool(checkpoint_folders(run_dir)) or (run_dir / "checkpoints" / POINTER).exists()


def point_to(checkpoint: Path) -> None:
    """Make `latest.json` name this checkpoint; to be called once it is whole and in its place."""
    sync_names(checkpoint.parent)
    write_json(
        checkpoint.parent / POINTER, {"checkpoint": checkpoint.name, "step": int(checkpoint.name[-8:])}
    )


def pointed_to(run_dir: Path) -> str | None:
    """The name that `latest.json` holds; None where there is no pointer, or a damaged one."""
    try:
        name = read_json(run_dir / "checkpoints" / POINTER)["checkpoint"]
    except (UserError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and _NAME.match(name) else None


def newest_intact(run_dir: Path) -> Path | None:
    """The newest checkpoint whose sizes and checksums are right; None where a run has none at all.

    Damaged ones are passed over with a warning on stderr that names the bad file, and the pointer is set right.

    Raises:
        UserError: there are checkpoints, and none is intact.
    """
    complaints = []
    named = pointed_to(run_dir)
    if named and not (run_dir / "checkpoints" / named).is_dir():
        complaints.append(f"{run_dir / 'checkpoints' / named}: missing, though {POINTER} names it")
    for path in reversed(checkpoint_folders(run_dir)):
        damage = find_damage(path)
        if damage is None:
            for complaint in complaints:
                print(f"warning: {complaint}; falling back to {path.name}", file=sys.stderr)
            if named != path.name:
                point_to(path)
            return path
        complaints.append(damage)
    if not complaints and not holds_checkpoints(run_dir):
        return None
    found = "; ".join(complaints) or f"{run_dir / 'checkpoints' / POINTER}: nothing but the pointer is left"
    raise UserError(
        f"{run_dir}: no checkpoint is intact ({found}); bring one back, name another --train.output_dir, or start "
        "afresh with --train.overwrite true"
    )
