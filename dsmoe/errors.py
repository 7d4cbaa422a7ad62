"""The one exception for bad input: a single clear line for the user, exit status 2, no traceback."""

import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any

# no space, quota used up, file larger than the file system or the shell's limit allows
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one line that says what was wrong, where, the offending value and what would be right.
    Command-line entry points print it and exit with status 2.
    """


def reason_of(error: BaseException) -> str:
    """What an exception of a library says, in one line: its first, or all of them where the first ends in a colon."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return " ".join(str(error).split()) if first.endswith(":") else first


def disk_is_full(error: BaseException) -> bool:
    """Whether an OSError, or one that safetensors passes on as text, says that there is no room."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(match[1])
    return number in _FULL


def run_reporting_errors(function: Callable[[], Any]) -> int:
    """Call `function()` and return the exit status of the command.

    A UserError, a full disk, and what the system says of a file or folder, becomes one line on stderr and status 2;
    Ctrl-C 130; a closed pipe 141.
    """
    try:
        function()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # the reader of a pipe (`| head`) has seen enough; the interpreter's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if disk_is_full(error):
            return _told_full(error)
        # without a file's name (a network), or with the URL that urllib puts there, one line would say too little
        if error.filename is None or error.strerror is None:
            raise
        # of a renaming the second name is the one that the user gave; the first is a temporary one
        print(f"error: {error.filename2 or error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # safetensors has an exception of its own
        if disk_is_full(error):
            return _told_full(error)
        raise
    return 0


def _told_full(error: Exception) -> int:
    name = getattr(error, "filename", None)
    where = "" if name is None else f"{name}: "
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    print(
        f"error: {where}the disk is full ({words}); make room, and give the same command again",
        file=sys.stderr,
    )
    return 2
