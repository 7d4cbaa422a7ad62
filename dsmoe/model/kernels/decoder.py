"""One decoding step of the whole model as one call of C++ on CPU (see `decoder.cpp`): its structs and its library.

The structs hold addresses of tensors; whoever fills them keeps the tensors alive (see `dsmoe.model.generation.plan`).
"""

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe.model.kernels import check
from dsmoe.model.kernels.build import load_library

SOURCE = Path(__file__).with_name("decoder.cpp")
DTYPES = (torch.float32, torch.bfloat16)
PARTS = ("attention_projections", "attention", "mlp", "lm_head")
CHOICES = ("dense", "top_k", "threshold", "top_p", "threshold_top_k")
NORMALIZATIONS = ("softmax", "l2", "renormalized")
QK_NORMS = ("none", "full", "per_head")

_functions: dict[torch.dtype, Any] = {}


class Matrix(ctypes.Structure):
    """Weights [rows, depth]; with scales they are int8."""

    _fields_ = [("data", ctypes.c_void_p), ("scales", ctypes.c_void_p)]


class Routing(ctypes.Structure):
    """A router, its policy and its gates; `experts` 0: none."""

    _fields_ = [
        ("experts", ctypes.c_int64),
        ("stored", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("in_proj", ctypes.c_void_p),
        ("hidden", ctypes.c_int64),
        ("choice", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("thresholds", ctypes.c_void_p),
        ("score_weights", ctypes.c_void_p),
        ("normalization", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("constant", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    """A decoder layer and its part of the cache."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, Matrix) for name in ("q", "k", "v", "o", "up", "down")),
        ("attention", Routing),
        ("mlp", Routing),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    ]


class Model(ctypes.Structure):
    """All of it."""

    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("lm_head", Matrix),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_layers", "hidden", "vocab", "width", "swiglu", "heads", "kv_heads", "head_dim", "slots",
                "qk_norm", "normalize_embeddings",
            )
        ),
        ("eps", ctypes.c_float),
    ]  # fmt: skip


def step(
    model: Model,
    dtype: torch.dtype,
    ids_B: Tensor,
    starts_B: Tensor,
    slot: int,
    logits_BV: Tensor,
    seconds: Tensor | None = None,
) -> None:
    """Run the model on one token of each sequence; `load` comes first.

    Args:
        model: filled in.
        dtype: of the weights that are not int8.
        ids_B: [B] int64, contiguous, below the vocabulary size.
        starts_B: [B] int64: slots before these are padding.
        slot: where keys and values go; all slots before it are filled.
        logits_BV: [B, V] float32, contiguous: receives the logits.
        seconds: [PARTS] float64: the time of each part is added.
    """
    _functions[dtype](
        ctypes.addressof(model),
        ids_B.data_ptr(),
        starts_B.data_ptr(),
        ids_B.shape[0],
        slot,
        logits_BV.data_ptr(),
        None if seconds is None else seconds.data_ptr(),
        torch.get_num_threads(),
    )


def load() -> None:
    """Load the library, compiling it if needed.

    Raises:
        check.KernelUnavailable: says what is missing or went wrong.
    """
    load_library(SOURCE, _use)


def _use(library: ctypes.CDLL) -> None:
    sizes = (ctypes.c_int64 * 3)()
    library.dsmoe_decode_sizes(sizes)
    if list(sizes) != [ctypes.sizeof(struct) for struct in (Routing, Layer, Model)]:
        raise check.KernelUnavailable("its structs are laid out in another way")
    for dtype in DTYPES:
        function = getattr(library, f"dsmoe_decode_{str(dtype).removeprefix('torch.')}")
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        function.argtypes = [pointer, pointer, pointer, integer, integer, pointer, pointer, ctypes.c_int]
        function.restype = None
        _functions[dtype] = function
