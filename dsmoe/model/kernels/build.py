"""C++ kernels for CPUs: compiled on first use (never at installation) and then kept.

One compiler command makes a shared library in the user's cache folder and an atomic rename puts it in place, so there
is no lock: processes that start together may each compile (some seconds), and a killed build leaves nothing in the way.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsmoe.model.kernels.check import KernelUnavailable

# no -ffast-math: NaN must stay NaN, and it would switch denormals off for the whole process
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_SECONDS = 300


def load_library(source: Path, use: Callable[[ctypes.CDLL], Any]) -> None:
    """Load the library of a source, compiling it if the cache has none that works.

    Args:
        source: a .cpp file; it may include the *.inc.cpp beside it.
        use: takes the library into use; raises AttributeError or KernelUnavailable if it isn't what it should be.

    Raises:
        KernelUnavailable: says what is missing or went wrong.
    """
    try:
        _load(source, use)
    except (OSError, RuntimeError) as error:
        # a full disk, no folder for temporary files, no home folder, ...
        raise KernelUnavailable(f"the library can't be made: {error}") from error


def _load(source: Path, use: Callable[[ctypes.CDLL], Any]) -> None:
    cached = cache_path(source)
    # no such file, a library of another machine, a damaged one: all are cured by compiling
    with contextlib.suppress(OSError, AttributeError, KernelUnavailable):
        use(ctypes.CDLL(str(cached)))
        return
    # beside its final place where that can be written (a temporary folder may forbid execution)
    parent = cached.parent if os.access(cached.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dsmoe-build-", dir=parent, ignore_cleanup_errors=True) as folder:
        built = Path(folder) / cached.name
        _compile(source, built)
        try:
            use(ctypes.CDLL(str(built)))
        except (OSError, AttributeError) as error:
            raise KernelUnavailable(f"the compiled library does not load: {error}") from error
        with contextlib.suppress(OSError):  # then the next process compiles again
            built.replace(cached)


def cache_path(source: Path) -> Path:
    """Where the library of a source is kept: torch's folder of compiled extensions, created if that is possible.

    The name is a hash of all that decides whether a library fits: source, flags, torch, compiler asked for, processor
    (a home folder may be shared by different machines, and -march=native code is not).
    """
    key = (
        source.read_bytes(),
        *(included.read_bytes() for included in sorted(source.parent.glob("*.inc.cpp"))),
        _FLAGS,
        torch.__version__,
        os.environ.get("CXX"),
        platform.machine(),
        _processor(),
    )
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    folder = _extensions() / "dsmoe"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{source.stem}-{name}.so"


def _extensions() -> Path:
    """torch's folder of compiled extensions.

    Raises:
        RuntimeError: neither variable is set, and the user has no home.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "torch_extensions"
    return Path("~/.cache/torch_extensions").expanduser()


@functools.cache
def _processor() -> str:
    """What distinguishes processors: on Linux the model and its feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(names))


def compiler() -> list[str]:
    """$CXX if set, else g++, c++ or clang++ from PATH."""
    asked = os.environ.get("CXX")
    if asked:
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise KernelUnavailable(f"the compiler that CXX names, {asked!r}, is not on PATH")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise KernelUnavailable("no C++ compiler was found (tried g++, c++, clang++; set CXX to another)")


def _compile(source: Path, path: Path) -> None:
    command = [*compiler(), *_FLAGS, str(source), "-o", str(path)]
    try:
        # some compilers know no -march=native on their processor
        error = _run([*command, "-march=native"]) and _run(command)
    except subprocess.TimeoutExpired:
        error = f"it took longer than {_COMPILE_SECONDS} seconds"
    if error:
        raise KernelUnavailable(f"{command[0]} failed: {error}")


def _run(command: list[str]) -> str:
    """What went wrong, in one line; empty if nothing did.

    Raises:
        subprocess.TimeoutExpired: it was not ready in time; nothing of it runs on.
    """
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        # a group of its own: the command is but the driver of the compiler, which would outlive it
        process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)  # type: ignore[call-overload]
    except OSError as error:
        return str(error)
    try:
        _, output = process.communicate(timeout=_COMPILE_SECONDS)
    except BaseException:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    lines = [line for line in output.splitlines() if line.strip()]
    return (
        ""
        if process.returncode == 0
        else next((s for s in lines if "error" in s), f"exit status {process.returncode}")
    )
