"""What a result depends on besides its configuration: this package's code, versions, hardware, threads."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGES = (
    "dsmoe",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "lm_eval",
    "safetensors",
    "deepspeed",
    "numpy",
)


def versions() -> dict[str, str]:
    """Version of Python and of each installed package of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory in bytes, torch threads and accelerators."""
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if sys.platform == "linux"
        else None,
        "accelerators": [],
    }
    if torch.cuda.is_available():
        found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def machine_name(hardware: Mapping[str, Any]) -> str:
    """One line for the processor, or the accelerators, of `hardware`: losses of one run differ a little between kinds."""
    if hardware.get("accelerators"):
        kinds = Counter(hardware["accelerators"])
        return ", ".join(f"{count} {name}" for name, count in kinds.items())
    return ", ".join(str(hardware[key]) for key in ("cpu", "cpu_capability") if hardware.get(key))


def code() -> dict[str, str | None]:
    """Which code this is: the SHA-256 of the package's source files, and the commit where it lies in its repository.

    Files that were changed since the commit show in the first alone.
    """
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(path for path in package.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return {"sha256": digest.hexdigest(), "commit": _commit(package.parent)}


def describe() -> dict[str, Any]:
    """Code, versions and hardware, as they go into every record."""
    return {"code": code(), "versions": versions(), "hardware": hardware()}


def tell_deepspeed() -> None:
    """Name the accelerator to DeepSpeed before transformers imports it, which it does when it saves a model.

    Left to find out by itself that there is a CPU only, DeepSpeed prints a warning into the output of the command.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _commit(root: Path) -> str | None:
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def default_device() -> str:
    """Where models are measured and scored unless another device is named: "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
