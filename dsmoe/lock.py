"""A lock against two commands that write in one folder: `run.lock`, with the process that holds it.

The kernel's lock on the file (flock) decides where the file system has it: it ends with its process. Elsewhere the file
itself decides, and a holder that is gone is known by its process id or, on another machine, by a file that nobody renews.
"""

import contextlib
import errno
import json
import os
import platform
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
RENEW_SECONDS = 10.0
PATIENCE_SECONDS = 35.0


class FolderLock:
    """Context manager that holds a folder's lock.

    Args:
        folder: made if need be.
        otherwise: what to do instead of waiting, for the error, such as "name another --output".

    Raises:
        UserError: another process that is alive holds it.
    """

    def __init__(self, folder: Path, otherwise: str) -> None:
        self.path = folder / LOCK
        self.otherwise = otherwise
        self._file = -1
        self._released = threading.Event()

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path.parent}: can't be made a folder ({error.strerror})") from None
        while not self._take():
            pass
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._released.set()
        with contextlib.suppress(OSError):
            if self._is_in_place():
                self.path.unlink()
        os.close(self._file)

    def _take(self) -> bool:
        """One try; False where the file changed hands meanwhile."""
        flags = os.O_RDWR | os.O_CREAT
        try:
            self._file, is_new = os.open(self.path, flags | os.O_EXCL, 0o644), True
        except FileExistsError:
            self._file, is_new = os.open(self.path, flags, 0o644), False
        try:
            locked = self._flock()
            ours = self._is_in_place() and (is_new or self._recover(locked))
        except BaseException:
            os.close(self._file)
            raise
        if not ours:
            os.close(self._file)
            return False
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(_this_process()).encode(), 0)
        os.fsync(self._file)
        return True

    def _flock(self) -> bool:
        """Whether the file system grants the lock; False where it knows no locks."""
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refusal(self._holder()) from None
            return False
        return True

    def _is_in_place(self) -> bool:
        """Whether the file that was opened is still the one of that name: its holder deletes it when done."""
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def _recover(self, locked: bool) -> bool:
        """Take over from a holder that is gone; False where the file must be made anew for that."""
        holder = self._holder()
        if not self._is_gone(holder, locked):
            raise self._refusal(holder)
        print(f"warning: {self.path}: left by {_name(holder)}, which is gone; taken over", file=sys.stderr)
        if not locked:
            # of several that see the same, only one makes the new file
            self.path.unlink(missing_ok=True)
        return locked

    def _is_gone(self, holder: dict[str, Any], locked: bool) -> bool:
        here = _this_process()
        if not holder:
            return locked
        if holder.get("host") == here["host"]:
            same_boot = holder.get("boot_id") == here["boot_id"]
            return locked or not same_boot or _start_time(holder.get("pid", 0)) != holder.get("start_time")
        # some network file systems grant a lock to each machine, and another machine's processes can't be seen
        before = self.path.stat().st_mtime_ns
        waiting = f"waiting {PATIENCE_SECONDS:.0f} s for a sign of life"
        print(f"{self.path}: held by {_name(holder)}; {waiting}", file=sys.stderr)
        time.sleep(PATIENCE_SECONDS)
        return self.path.exists() and self.path.stat().st_mtime_ns == before

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        return UserError(
            f"{self.path.parent}: another run is writing there ({_name(holder)}); wait for it, stop it, or "
            f"{self.otherwise}"
        )

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(os.pread(self._file, 4096, 0))
        except ValueError:
            return {}
        return holder if isinstance(holder, dict) else {}

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def _name(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process of unknown name"
    return f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "boot_id": _read("/proc/sys/kernel/random/boot_id"),
        "start_time": _start_time(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _start_time(pid: int) -> str | None:
    """When a process was started, in ticks since the boot; None where there is no such process (or no /proc)."""
    text = _read(f"/proc/{pid}/stat")
    # the name in parentheses may hold spaces
    return text.rpartition(")")[2].split()[19] if text else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
