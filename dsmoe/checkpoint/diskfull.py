"""A full disk ends a run with one clear line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dsmoe.errors import UserError, disk_is_full


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk inside the block into a UserError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        raise UserError(
            f"{folder}: the disk is full ({' '.join(str(error).split())}); training stopped, and all checkpoints "
            "written before are kept: make room, then continue with --train.resume true"
        ) from None
