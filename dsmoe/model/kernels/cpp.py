"""The gated activation as fused C++ for CPUs, compiled on first use (never at installation) and then kept.

One compiler command makes a shared library in the user's cache folder and an atomic rename puts it in place, so there
is no lock: processes that start together may each compile (about a second), and a killed build leaves nothing in the way.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.model.kernels import check

NAME = "cpp"
DTYPES = (torch.float32, torch.bfloat16)

_SOURCE = Path(__file__).with_name("gated_activation.cpp")
# no -ffast-math: NaN must stay NaN, and it would switch denormals off for the whole process
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
_COMPILE_SECONDS = 120
_MIN_ELEMENTS_PER_THREAD = 1 << 15

_library: ctypes.CDLL | None = None


def forward(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """See `eager.forward`; knows no autograd."""
    width = h_TNH.shape[-1] // 2 if mlp_type == "swiglu" else h_TNH.shape[-1]
    h, gates = _prepared(h_TNH, gates_TN)
    result_TNF = h.new_empty(*h.shape[:-1], width)
    _function("forward", h.dtype)(
        _pointer(h), _pointer(gates), _pointer(result_TNF), *_sizes(result_TNF, mlp_type)
    )
    return result_TNF


def backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`; overwrites a contiguous `grad_TNF` with the result."""
    h, gates = _prepared(h_TNH, gates_TN)
    grad = grad_TNF.to(h.dtype).contiguous()
    assert grad.shape[:-1] == h.shape[:-1] and h.shape[-1] == grad.shape[-1] * (
        2 if mlp_type == "swiglu" else 1
    )
    grad_h = torch.empty_like(h)
    grad_gates = None if gates is None else torch.empty_like(gates)
    _function("backward", h.dtype)(
        _pointer(grad),
        _pointer(h),
        _pointer(gates),
        _pointer(grad_h),
        _pointer(grad_gates),
        *_sizes(grad, mlp_type),
    )
    return grad_h, grad_gates, grad


def _prepared(h_TNH: Tensor, gates_TN: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both contiguous and of one dtype, as the C++ side takes for granted."""
    if gates_TN is None:
        return h_TNH.contiguous(), None
    assert gates_TN.shape == h_TNH.shape[:-1] and gates_TN.device == h_TNH.device
    return h_TNH.contiguous(), gates_TN.to(h_TNH.dtype).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _sizes(result_TNF: Tensor, mlp_type: str) -> tuple[int, int, int, int]:
    """Rows, width, whether swiglu, threads."""
    width = result_TNF.shape[-1]
    threads = max(1, min(torch.get_num_threads(), result_TNF.numel() // _MIN_ELEMENTS_PER_THREAD))
    return result_TNF.numel() // max(width, 1), width, int(mlp_type == "swiglu"), threads


def _function(direction: str, dtype: torch.dtype):
    assert _library is not None, "probe() comes first"
    return getattr(_library, f"dsmoe_{direction}_{str(dtype).removeprefix('torch.')}")


def probe(device_type: str) -> None:
    """Load the library, compiling it if the cache has none that works, and check its numbers against `eager`.

    Raises:
        check.KernelUnavailable: says what is missing or went wrong.
    """
    if device_type != "cpu":
        raise check.KernelUnavailable(f"it computes on CPU only, the tensors are on {device_type}")
    cached = _cache_path()
    # no such file, a library of another machine, a damaged one: all are cured by compiling
    with contextlib.suppress(OSError, AttributeError, check.KernelUnavailable):
        _load(cached)
        return
    # beside its final place where that can be written (a temporary folder may forbid execution)
    parent = cached.parent if os.access(cached.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dsmoe-build-", dir=parent, ignore_cleanup_errors=True) as folder:
        built = Path(folder) / cached.name
        _compile(built)
        try:
            _load(built)
        except (OSError, AttributeError) as error:
            raise check.KernelUnavailable(f"the compiled library does not load: {error}") from error
        with contextlib.suppress(OSError):  # then the next process compiles again
            built.replace(cached)


def _load(path: Path) -> None:
    global _library
    library = ctypes.CDLL(str(path))
    pointers_of = {"forward": 3, "backward": 5}
    for direction, pointers in pointers_of.items():
        for dtype in DTYPES:
            function = getattr(library, f"dsmoe_{direction}_{str(dtype).removeprefix('torch.')}")
            sizes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
            function.argtypes, function.restype = [ctypes.c_void_p] * pointers + sizes, None
    previous, _library = _library, library
    try:
        check.against_eager(forward, backward, "cpu", DTYPES)
    except check.KernelUnavailable:
        _library = previous
        raise


def _cache_path() -> Path:
    """Where the library is kept: torch's folder of compiled extensions, created if that is possible.

    The name is a hash of all that decides whether a library fits: source, flags, torch, compiler asked for, processor
    (a home folder may be shared by different machines, and -march=native code is not).
    """
    key = (
        _SOURCE.read_bytes(),
        _FLAGS,
        torch.__version__,
        os.environ.get("CXX"),
        platform.machine(),
        _processor(),
    )
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions") / "dsmoe"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder / f"gated_activation-{name}.so"


@functools.cache
def _processor() -> str:
    """What distinguishes processors: on Linux the model and its feature flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(names))


def _compiler() -> list[str]:
    """$CXX if set, else g++, c++ or clang++ from PATH."""
    asked = os.environ.get("CXX")
    if asked:
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise check.KernelUnavailable(f"the compiler that CXX names, {asked!r}, is not on PATH")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise check.KernelUnavailable("no C++ compiler was found (tried g++, c++, clang++; set CXX to another)")


def _compile(path: Path) -> None:
    compiler = _compiler()
    command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(path)]
    # some compilers know no -march=native on their processor
    error = _run([*command, "-march=native"]) and _run(command)
    if error:
        raise check.KernelUnavailable(f"{compiler[0]} failed: {error}")


def _run(command: list[str]) -> str:
    """What went wrong, in one line; empty if nothing did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return (
        ""
        if done.returncode == 0
        else next((s for s in lines if "error" in s), f"exit status {done.returncode}")
    )
