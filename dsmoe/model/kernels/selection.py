"""Which kernel computes the gated activation: DSMOE_KERNEL=auto|eager|compile|cpp, read at first use.

`auto` takes cpp on CPU and compile on CUDA (untested: no GPU was at hand), and eager with a warning
where that kernel can't be had. A kernel that is asked for by name and can't be had is an error.
float64, and tensors that stand for others (meta, fake), always go through eager.
"""

import logging
import os
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsmoe.errors import UserError
from dsmoe.model.kernels import compiled, cpp, eager
from dsmoe.model.kernels.check import KernelUnavailable

VARIABLE = "DSMOE_KERNEL"
_KERNELS: dict[str, Any] = {kernel.NAME: kernel for kernel in (eager, compiled, cpp)}
_CHOICES = ("auto", *_KERNELS)
_AUTO = {"cpu": cpp.NAME, "cuda": compiled.NAME}

_SLOWER = "results agree, dense training is slower (on CPU by 5 to 10%)"

_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_kernel_of_device: dict[str, Any] = {}


def selected_kernel(device_type: str = "cpu") -> str:
    """Name of the kernel for tensors of a device: "eager", "compile" or "cpp".

    Args:
        device_type: "cpu", "cuda", ...

    Raises:
        UserError: DSMOE_KERNEL is none of the choices, or names a kernel that can't be had here.
    """
    return _kernel(device_type).NAME


def reset_kernel() -> None:
    """Forget the choice, so that DSMOE_KERNEL is read again (for tests)."""
    with _lock:
        _kernel_of_device.clear()


def gated_activation(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """See `eager.forward`."""
    return _kernel_for(h_TNH, gates_TN).forward(h_TNH, gates_TN, mlp_type)


def gated_activation_backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`."""
    return _kernel_for(h_TNH, gates_TN).backward(grad_TNF, h_TNH, gates_TN, mlp_type)


def _kernel_for(h_TNH: Tensor, gates_TN: Tensor | None) -> Any:
    if torch.compiler.is_compiling():
        return compiled  # becomes part of what is being compiled
    if is_in_torch_dispatch_mode():
        return eager  # whoever records or counts operations must see them
    if type(h_TNH) is not Tensor or h_TNH.is_meta or h_TNH.numel() == 0:
        return eager
    needs_autograd = h_TNH.requires_grad or (gates_TN is not None and gates_TN.requires_grad)
    if needs_autograd and torch.is_grad_enabled():
        return eager  # the others record no graph
    kernel = _kernel(h_TNH.device.type)
    return kernel if kernel is not eager and h_TNH.dtype in kernel.DTYPES else eager


def _kernel(device_type: str) -> Any:
    kernel = _kernel_of_device.get(device_type)
    if kernel is None:
        with _lock:
            kernel = _kernel_of_device.get(device_type)
            if kernel is None:
                kernel = _kernel_of_device[device_type] = _choose(device_type)
    return kernel


def _choose(device_type: str) -> Any:
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in _CHOICES:
        raise UserError(f"{VARIABLE}={choice!r} is no kernel; it is one of {', '.join(_CHOICES)}")
    name = _AUTO.get(device_type, eager.NAME) if choice == "auto" else choice
    if name == eager.NAME:
        return eager
    try:
        _KERNELS[name].probe(device_type)
    except KernelUnavailable as reason:
        if choice != "auto":
            raise UserError(
                f"{VARIABLE}={choice} can't be had: {reason}; auto falls back to eager"
            ) from reason
        # once a machine, not once a process of torchrun
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _logger.warning(
                "gated activation: kernel eager instead of %s, because %s; %s", name, reason, _SLOWER
            )
        return eager
    return _KERNELS[name]
