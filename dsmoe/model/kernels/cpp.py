"""The gated activation as fused C++ for CPUs (see `build` for how it is compiled and kept)."""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from dsmoe.model.kernels import check
from dsmoe.model.kernels.build import load_library

NAME = "cpp"
DTYPES = (torch.float32, torch.bfloat16)
SOURCE = Path(__file__).with_name("gated_activation.cpp")

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
    """Load the library, compiling it if needed, and check its numbers against `eager`.

    Raises:
        check.KernelUnavailable: says what is missing or went wrong.
    """
    if device_type != "cpu":
        raise check.KernelUnavailable(f"it computes on CPU only, the tensors are on {device_type}")
    load_library(SOURCE, _use)


def _use(library: ctypes.CDLL) -> None:
    global _library
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
