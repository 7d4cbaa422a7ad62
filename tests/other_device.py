"""An accelerator that is none: tensors that say they lie on another device, and are computed on the CPU.

A tensor of `DEVICE` holds one of the CPU, with which a dispatch mode computes what is asked of it. As on a GPU an
operation on tensors of both kinds is refused (but for numbers, indices and copies), so that a mask or a position that
was made on the wrong device shows, in a forward and a backward pass, without any such machine. What it can't show:
kernels, streams, and code that asks for "cuda" by name.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

DEVICE = "elsewhere"
# a copy from one device to the other, and indices of the CPU in a tensor of the GPU
_ACROSS = ("copy_", "_copy_from", "index", "index_put", "index_put_", "_index_put_impl_")


class _Hook(_DummyPrivateUse1Hook):
    """One that is never found by who looks for an accelerator: other tests in the process shall not use it."""

    def is_available(self):
        return False


class _Backend(_DummyBackendModule):
    def is_available(self):
        return False

    def device_count(self):
        return 0

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]


class Elsewhere(Tensor):
    """A tensor whose `device` is `DEVICE`; `held` is the CPU's tensor with its values."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(DEVICE, 0),
        )  # fmt: skip

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> list:
        return self.held.tolist()  # torch has none for subclasses

    def __repr__(self) -> str:
        return f"Elsewhere({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} on a tensor of {DEVICE} outside `accelerator()`")


@contextmanager
def accelerator():
    """Here tensors of `DEVICE` can be made and computed with."""
    # tensors that are made in inference mode can't be held: autograd gives what holds them no version counter
    no_inference = mock.patch("torch.inference_mode", _no_grad)
    with _Literals(), _Computing(), no_inference, mock.patch("torch.nn.Module.to", _to):
        yield


def _to(module, *args, **kwargs):
    return (
        put(module)
        if any(_is_elsewhere(each) for each in (*args, *kwargs.values()))
        else _MODULE_TO(module, *args, **kwargs)
    )


_MODULE_TO = nn.Module.to


def _no_grad(mode=True):
    return torch.set_grad_enabled(False) if mode else torch.set_grad_enabled(torch.is_grad_enabled())


class _Literals(TorchFunctionMode):
    """torch.tensor makes the CPU's tensors, which are brought to their device: it asks no dispatch mode."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and _is_elsewhere(kwargs.get("device")):
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])  # torch would make the index on the device
        return function(*args, **kwargs)


class _Computing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        flat, structure = tree_flatten((args, kwargs or {}))
        wanted = (kwargs or {}).get("device")
        held = {id(each.held): each for each in flat if isinstance(each, Elsewhere)}
        name = function.overloadpacket.__name__
        changed = flat[0] if name.endswith("_") else None  # a number of the CPU takes nothing in from a GPU
        strangers = [
            each
            for each in flat
            if type(each) in (Tensor, nn.Parameter) and (each.dim() > 0 or each is changed)
        ]
        if held and strangers and name not in _ACROSS:
            raise AssertionError(
                f"{name}: a tensor of {DEVICE} and one of the CPU, of shape {tuple(strangers[0].shape)}"
            )
        inner_args, inner_kwargs = tree_unflatten([_inner(each) for each in flat], structure)
        result = function(*inner_args, **inner_kwargs)
        if name == "_local_scalar_dense" or (not held and not _is_elsewhere(wanted)):
            return result
        if wanted is not None and not _is_elsewhere(wanted):
            return result  # brought to the CPU
        return tree_map_only(
            Tensor, lambda made: held[id(made)] if id(made) in held else Elsewhere(made), result
        )


def put(model: nn.Module) -> nn.Module:
    """The same modules with their parameters and buffers on `DEVICE`; tied weights stay one."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, Elsewhere):
                    tensors[name] = moved.setdefault(id(tensor), _moved(tensor))
    return model


def _moved(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(Elsewhere(tensor.detach()), tensor.requires_grad)
    return Elsewhere(tensor)


def _inner(each):
    if isinstance(each, Elsewhere):
        return each.held
    return torch.device("cpu") if isinstance(each, torch.device) and _is_elsewhere(each) else each


def _is_elsewhere(device) -> bool:
    return str(device).split(":")[0] == DEVICE


if torch._C._get_privateuse1_backend_name() != DEVICE:
    _setup_privateuseone_for_python_backend(DEVICE, _Backend(), _Hook())
