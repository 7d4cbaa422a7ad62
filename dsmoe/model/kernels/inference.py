"""Gated experts without gradients, as one call of C++ on CPU (see `sparse_experts.cpp`): kept experts, or all.

What it does not cover, its callers compute in plain torch operations; `selection` decides.

Shapes: T tokens, D hidden size, N experts, F hidden units of one expert, H = 2F (swiglu) or F (gelu).
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsmoe.model.kernels import check
from dsmoe.model.kernels.build import load_library

NAME = "cpp"
SOURCE = Path(__file__).with_name("sparse_experts.cpp")
DTYPES = (torch.float32, torch.bfloat16)
# a thread's share of a smaller layer isn't worth waking it
_MIN_BYTES_PER_THREAD = 1 << 17
# up to so many tokens all experts are faster here than as wide GEMMs
MOST_TOKENS_OF_ALL_EXPERTS = 8
# with more tokens an AMX unit, which only oneDNN uses here, is faster in bfloat16
_MOST_TOKENS_BESIDE_AMX = 32

_library: ctypes.CDLL | None = None
# by the dtypes of tokens and weights
_functions: dict[tuple[torch.dtype, torch.dtype], Any] = {}


def forward(
    x_TD: Tensor,
    gates_TN: Tensor | None,
    expert_mask_TN: Tensor | None,
    up_NHD: Tensor,
    down_NFD: Tensor,
    mlp_type: str,
    up_scales_NH: Tensor | None = None,
    down_scales_NF: Tensor | None = None,
) -> Tensor:
    """Sum over the kept experts of gate times expert output; `probe` comes first, `is_covered` says for what.

    Args:
        x_TD: [T, D] tokens.
        gates_TN: [T, N] gates; None: gates of one.
        expert_mask_TN: [T, N] bool, which experts each token keeps; None: all.
        up_NHD: [N, H, D] input projections, contiguous, of the dtype of `x_TD`, or int8.
        down_NFD: [N, F, D] output projections, likewise.
        mlp_type: "swiglu" or "gelu".
        up_scales_NH: [N, H] float32, contiguous, for int8: what each row is multiplied with.
        down_scales_NF: [N, F], likewise.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    num_experts, width, hidden = down_NFD.shape
    tokens, swiglu = x_TD.shape[0], mlp_type == "swiglu"
    assert x_TD.shape == (tokens, hidden) and up_NHD.shape == (num_experts, width * (1 + swiglu), hidden)
    x_TD = x_TD.contiguous()
    gates = mask = None  # kept alive here while the C++ side reads them
    if gates_TN is not None:
        assert gates_TN.shape == (tokens, num_experts)
        # a conversion that changes nothing still takes as long as reading 50 kB of weights
        gates = gates_TN if gates_TN.dtype is torch.float32 else gates_TN.to(torch.float32)
        gates = gates.contiguous()
    if expert_mask_TN is not None:
        assert expert_mask_TN.shape == (tokens, num_experts) and expert_mask_TN.dtype is torch.bool
        mask = expert_mask_TN.contiguous()
    out_TD = torch.empty_like(x_TD)
    threads = torch.get_num_threads()
    if threads > 1:
        threads = min(threads, 1 + 3 * down_NFD.nbytes // _MIN_BYTES_PER_THREAD)
    assert (up_scales_NH is not None) == (up_NHD.dtype is torch.int8) == (down_scales_NF is not None)
    for scales in (up_scales_NH, down_scales_NF):
        assert scales is None or (scales.dtype is torch.float32 and scales.is_contiguous())
    _functions[x_TD.dtype, up_NHD.dtype](
        x_TD.data_ptr(),
        None if gates is None else gates.data_ptr(),
        None if mask is None else mask.data_ptr(),
        up_NHD.data_ptr(),
        down_NFD.data_ptr(),
        None if up_scales_NH is None else up_scales_NH.data_ptr(),
        None if down_scales_NF is None else down_scales_NF.data_ptr(),
        out_TD.data_ptr(),
        tokens, num_experts, hidden, width, swiglu, threads,
    )  # fmt: skip
    return out_TD


def is_covered(x_TD: Tensor, gates_TN: Tensor | None, up_NHD: Tensor, down_NFD: Tensor) -> bool:
    """Whether the kernel computes this: the dtype, ordinary tensors in CPU memory, no gradient wanted."""
    dtype, weights = x_TD.dtype, up_NHD.dtype
    if (
        dtype not in DTYPES
        or down_NFD.dtype is not weights
        or (weights is not dtype and weights is not torch.int8)
    ):
        return False
    if not (x_TD.is_cpu and up_NHD.is_cpu and up_NHD.is_contiguous() and down_NFD.is_contiguous()):
        return False
    if type(x_TD) is not Tensor or is_in_torch_dispatch_mode():
        return False  # stands for another tensor, or somebody records or counts operations
    if weights is torch.bfloat16 and (x_TD.shape[1] % 2 or _is_for_amx(x_TD.shape[0])):
        return False  # pairs of numbers are multiplied at a time
    return not torch.is_grad_enabled() or not (
        x_TD.requires_grad
        or up_NHD.requires_grad
        or down_NFD.requires_grad
        or (gates_TN is not None and gates_TN.requires_grad)
    )


def _is_for_amx(tokens: int) -> bool:
    return tokens > _MOST_TOKENS_BESIDE_AMX and torch.cpu._is_amx_tile_supported()


def read(numbers: Tensor) -> float:
    """Sum of float32 numbers, read once at full speed: what the memory bandwidth is measured with.

    Args:
        numbers: contiguous, float32, on CPU.
    """
    assert _library is not None and numbers.dtype is torch.float32 and numbers.is_contiguous()
    return _library.dsmoe_read(numbers.data_ptr(), numbers.numel(), torch.get_num_threads())


def read_experts(expert_mask_TN: Tensor, up_NHD: Tensor, down_NFD: Tensor) -> float:
    """Read the weights of all experts that some token keeps, and do nothing with them.

    Args:
        expert_mask_TN: [T, N] bool, contiguous.
        up_NHD: contiguous, of any dtype, on CPU; an expert's bytes are a multiple of 4.
        down_NFD: likewise.
    """
    assert _library is not None and expert_mask_TN.dtype is torch.bool and expert_mask_TN.is_contiguous()
    tokens, num_experts = expert_mask_TN.shape
    return _library.dsmoe_read_experts(
        expert_mask_TN.data_ptr(), up_NHD.data_ptr(), down_NFD.data_ptr(), tokens, num_experts,
        up_NHD.nbytes // num_experts, down_NFD.nbytes // num_experts, torch.get_num_threads(),
    )  # fmt: skip


def probe(device_type: str) -> None:
    """Load the library, compiling it if needed, and check its numbers against the definition.

    Raises:
        check.KernelUnavailable: says what is missing or went wrong.
    """
    if device_type != "cpu":
        raise check.KernelUnavailable(f"it computes on CPU only, the tensors are on {device_type}")
    load_library(SOURCE, _use)


def _use(library: ctypes.CDLL) -> None:
    global _library
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for weights, suffix in ((dtype, name), (torch.int8, f"int8_{name}")):
            function = getattr(library, f"dsmoe_experts_{suffix}")
            function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 4 + [ctypes.c_int] * 2
            function.restype = None
            _functions[dtype, weights] = function
    library.dsmoe_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.dsmoe_read.restype = ctypes.c_float
    library.dsmoe_read_experts.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4 + [ctypes.c_int]
    library.dsmoe_read_experts.restype = ctypes.c_float
    try:
        check.experts_against_definition(forward, DTYPES)
    except check.KernelUnavailable:
        _functions.clear()
        raise
    _library = library
