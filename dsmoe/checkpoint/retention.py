"""What of a run's folder is deleted: old checkpoints, and what interrupted writes have left."""

import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from dsmoe.checkpoint.manifest import find_damage
from dsmoe.checkpoint.newest import checkpoint_folders

# names of `dsmoe.files` for what is being written beside its place
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}\.tmp$")
_OURS = re.compile(r"step-\d{8}|checkpoints|final|(latest|summary|config|environment|seeds|comparison)\.json|config\.yaml"
                   r"|log\.jsonl")  # fmt: skip

# folders that this process has written or verified, as they were then
_verified: dict[Path, list[tuple]] = {}


def keep_newest(run_dir: Path, written: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` intact checkpoints.

    A checkpoint that fails verification counts for nothing, so that the last intact one always stays. What this process
    has written or verified itself isn't read again as long as sizes and times of its files stand: the newest is intact
    in any case, and resuming verifies everything.

    Args:
        run_dir: folder of the run.
        written: the checkpoint that was written just now; known to be intact.
        keep_last: how many to keep (at least 1).
    """
    kept = {written}
    _verified[written] = _signs(written)
    for path in reversed(checkpoint_folders(run_dir)):
        if len(kept) < keep_last and path not in kept and _intact(path):
            kept.add(path)
    for path in checkpoint_folders(run_dir):
        if path not in kept:
            discard(path)
            _verified.pop(path, None)


def _intact(path: Path) -> bool:
    """Whether a checkpoint is whole; its checksums are computed once, unless a file has been touched since."""
    signs = _signs(path)
    if _verified.get(path) != signs:
        if find_damage(path) is not None:
            _verified.pop(path, None)
            return False
        _verified[path] = signs
    return True


def _signs(folder: Path) -> list[tuple]:
    """What tells without reading that a file was changed, cut or replaced."""
    signs = []
    for path in sorted(folder.iterdir()):
        stat = path.stat()
        signs.append((path.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
    return signs


def discard(path: Path) -> None:
    """Delete a folder; a half-deleted one doesn't keep the name of a whole one."""
    if path.exists():
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed)


def clean_leftovers(folders: Iterable[Path]) -> list[str]:
    """Delete what interrupted writes of a run have left in these folders; other people's files stay.

    To be called by the only process that writes there.

    Returns:
        Names of what was deleted.
    """
    deleted = []
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else []:
            match = _TEMPORARY.match(path.name)
            if match is None or not _OURS.fullmatch(match["name"]):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
            deleted.append(path.name)
    return deleted
