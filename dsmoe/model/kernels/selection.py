"""Which kernels compute: DSMOE_KERNEL=auto|eager|compile|cpp, read at first use.

Of the gated activation, `auto` takes cpp on CPU and compile on CUDA (untested: no GPU was at hand), and eager with a
warning where that kernel can't be had. Of the experts without gradients, `auto` and `cpp` take cpp on CPU; elsewhere,
and with every other choice, they are plain torch operations. A kernel that is asked for by name and can't be had is an
error. float64, and tensors that stand for others (meta, fake), always go through torch operations.
"""

import logging
import os
import threading
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dsmoe.errors import UserError
from dsmoe.model.kernels import compiled, cpp, eager, inference
from dsmoe.model.kernels.check import KernelUnavailable

VARIABLE = "DSMOE_KERNEL"
_KERNELS: dict[str, Any] = {kernel.NAME: kernel for kernel in (eager, compiled, cpp)}
_CHOICES = ("auto", *_KERNELS)
_AUTO = {"cpu": cpp.NAME, "cuda": compiled.NAME}

_SLOWER = (
    "results agree, dense training is slower (on CPU by 5 to 10%), and so are inference with kept experts "
    "and generation (2 to 6 times)"
)

_logger = logging.getLogger(__name__)
_lock = threading.RLock()  # probing one kernel may choose another
_kernel_of_device: dict[str, Any] = {}
_inference_of_device: dict[str, Any] = {}
_whole_model_of_device: dict[str, Any] = {}
_warned: set[str] = set()


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
        _inference_of_device.clear()
        _whole_model_of_device.clear()
        _warned.clear()


def gated_activation(h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str) -> Tensor:
    """See `eager.forward`."""
    return _kernel_for(h_TNH, gates_TN).forward(h_TNH, gates_TN, mlp_type)


def gated_activation_backward(
    grad_TNF: Tensor, h_TNH: Tensor, gates_TN: Tensor | None, mlp_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `eager.backward`."""
    return _kernel_for(h_TNH, gates_TN).backward(grad_TNF, h_TNH, gates_TN, mlp_type)


def inference_kernel(device_type: str = "cpu") -> str | None:
    """Name of the kernel of experts without gradients for tensors of a device: "cpp", or None for torch operations.

    Raises:
        UserError: as `selected_kernel`.
    """
    kernel = _inference_kernel(device_type)
    return None if kernel is None else kernel.NAME


def inference_experts(
    x_TD: Tensor,
    gates_TN: Tensor | None,
    expert_mask_TN: Tensor | None,
    up_NHD: Tensor,
    down_NFD: Tensor,
    mlp_type: str,
    up_scales_NH: Tensor | None = None,
    down_scales_NF: Tensor | None = None,
) -> Tensor | None:
    """See `inference.forward`; None where a gradient is wanted or no kernel covers the tensors."""
    if torch.compiler.is_compiling() or not inference.is_covered(x_TD, gates_TN, up_NHD, down_NFD):
        return None
    if _inference_kernel("cpu") is None:
        return None
    scales = up_scales_NH, down_scales_NF
    return inference.forward(x_TD, gates_TN, expert_mask_TN, up_NHD, down_NFD, mlp_type, *scales)


def whole_model_kernel(kernel: Any, device_type: str = "cpu") -> Any:
    """A kernel for the decoding of whole models (see `dsmoe.model.generation.backend`), chosen as that of experts.

    Args:
        kernel: has NAME and probe(device_type); it is probed once.
        device_type: "cpu", "cuda", ...

    Returns:
        The kernel, or None for torch operations.

    Raises:
        UserError: as `selected_kernel`.
    """
    return _chosen(_whole_model_of_device, kernel, device_type)


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


def _inference_kernel(device_type: str) -> Any:
    return _chosen(_inference_of_device, inference, device_type)


def _chosen(known: dict[str, Any], kernel: Any, device_type: str) -> Any:
    try:
        return known[device_type]
    except KeyError:
        with _lock:
            if device_type not in known:
                covered = device_type == "cpu" and _choice() in ("auto", kernel.NAME)
                known[device_type] = _probed(kernel, device_type) if covered else None
            return known[device_type]


def _choice() -> str:
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in _CHOICES:
        raise UserError(f"{VARIABLE}={choice!r} is no kernel; it is one of {', '.join(_CHOICES)}")
    return choice


def _choose(device_type: str) -> Any:
    choice = _choice()
    name = _AUTO.get(device_type, eager.NAME) if choice == "auto" else choice
    if name == eager.NAME:
        return eager
    return _probed(_KERNELS[name], device_type) or eager


def _probed(kernel: Any, device_type: str) -> Any:
    """The kernel, or None (with a warning) if it can't be had."""
    try:
        kernel.probe(device_type)
    except KernelUnavailable as reason:
        choice = _choice()
        if choice != "auto":
            raise UserError(
                f"{VARIABLE}={choice} can't be had: {reason}; auto falls back to eager"
            ) from reason
        # one line for all kernels that lack the same, once a machine, not once a process of torchrun
        if os.environ.get("LOCAL_RANK", "0") == "0" and str(reason) not in _warned:
            _warned.add(str(reason))
            _logger.warning("kernels: eager instead of %s, because %s; %s", kernel.NAME, reason, _SLOWER)
        return None
    return kernel
