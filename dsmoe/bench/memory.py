"""What autograd keeps for the backward pass, and the peak of a step."""

import contextlib
import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def saved_bytes(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Bytes of activations that autograd keeps until the backward pass; each storage counts once.

    Args:
        function: a forward pass; what it returns keeps the graph alive.
        parameters: not counted, nor are casts of them or of slices [n] (autocast keeps those).

    Returns:
        Bytes.
    """
    weights: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        parts = [parameter, *parameter] if parameter.dim() == 3 else [parameter]
        for part in parts:
            weights.setdefault(part.numel(), []).append(part.detach())
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            is_weight = any(_is_cast_of(tensor, weight) for weight in weights.get(tensor.numel(), ()))
            storages[storage.data_ptr()] = 0 if is_weight else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = function()
    total = sum(storages.values())
    del kept
    return total


def _is_cast_of(tensor: Tensor, weight: Tensor) -> bool:
    if tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        return True
    if not tensor.is_floating_point():
        return False
    if tensor.dim() < 2 or weight.dim() < 2:
        return tensor.shape == weight.shape and torch.equal(tensor, weight.to(tensor.dtype))
    # a stack of matrices may have been used as one wide matrix, or as its transpose
    matrix, cast = tensor.flatten(0, -2), weight.to(tensor.dtype).flatten(0, -2)
    return any(form.shape == matrix.shape and torch.equal(form, matrix) for form in (cast, cast.T))


def peak_bytes(function: Callable[[], Any]) -> int | None:
    """Largest growth of the process's resident memory while `function` runs; None where Linux's /proc is missing."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # memory that malloc holds back would hide growth
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from here
        before = _status_bytes("VmRSS")
        function()
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, LookupError):
        return None


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)
