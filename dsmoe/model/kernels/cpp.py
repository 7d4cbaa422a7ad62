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
    h, gates = _prepared(h_TNH, gates_TN, h_TNH.dtype)
    result_TNF = torch.empty(*h.shape[:-1], width, dtype=h.dtype)
    _function("forward", h.dtype)(_pointer(h), _pointer(gates), _pointer(result_TNF), *_sizes(result_TNF, mlp_type))
    return result_TNF


def backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`; overwrites a contiguous `grad_TNF` with the result."""
    h, gates = _prepared(h_TNH, gates_TN, h_TNH.dtype)
    grad = grad_TNF.to(h.dtype).contiguous()
    grad_h = torch.empty_like(h)
    grad_gates = None if gates is None else torch.empty_like(gates)
    _function("backward", h.dtype)(
        _pointer(grad), _pointer(h), _pointer(gates), _pointer(grad_h), _pointer(grad_gates), *_sizes(grad, mlp_type)
    )
    return grad_h, grad_gates, grad


def _prepared(h_TNH: Tensor, gates_TN: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return h_TNH.contiguous(), None if gates_TN is None else gates_TN.to(dtype).contiguous()


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
    with contextlib.ExitStack() as stack:
        path = _cache_path()
        if path is None:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsmoe-"))) / "kernel.so"
        with contextlib.suppress(OSError, AttributeError, check.KernelUnavailable):
            return _load(path)
        _compile(path)
        try:
            _load(path)
        except (OSError, AttributeError) as error:
            raise check.KernelUnavailable(f"the compiled library does not load: {error}") from error


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


def _cache_path() -> Path | None:
    """Where the library belongs, in a folder that exists; None if the cache folder can't be written.

    The name is a hash of all that decides whether a library fits: source, flags, torch, compiler asked for, processor
    (a home folder may be shared by different machines, and -march=native code is not).
    """
    key = (_SOURCE.read_bytes(), _FLAGS, torch.__version__, os.environ.get("CXX"), platform.machine(), _processor())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions") / "dsmoe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"gated_activation-{name}.so" if os.access(folder, os.W_OK) else None


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
    """Compile beside `path`, then rename."""
    compiler = _compiler()
    handle, temporary = tempfile.mkstemp(prefix=path.stem, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        command = [*compiler, *_FLAGS, str(_SOURCE), "-o", temporary]
        # some compilers know no -march=native on their processor
        error = _run([*command, "-march=native"]) and _run(command)
        if error:
            raise check.KernelUnavailable(f"{compiler[0]} failed: {error}")
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """What went wrong, in one line; empty if nothing did."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return "" if done.returncode == 0 else next((s for s in lines if "error" in s), f"exit status {done.returncode}")
