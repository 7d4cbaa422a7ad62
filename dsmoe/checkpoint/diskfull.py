"""A full disk ends a run with one clear line."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dsmoe.errors import UserError

# no space, quota used up, file larger than the file system or the shell's limit allows
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_is_full(error: Exception) -> bool:
    """Whether an OSError, or one that safetensors passes on as text, says that there is no room."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    return number in FULL


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
