"""How the processes of a run share a model: this module has the plain way, copies that average gradients (DDP).

A strategy prepares model and optimiser, says when gradients are synchronised, clips them, and gathers whole weights and
moments for checkpoints, which are the same files whatever wrote them: a run may be resumed on another number of processes
or with another strategy. Those that shard are in `dsmoe.trainer.sharded` (FSDP2) and `dsmoe.trainer.zero` (DeepSpeed).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from dsmoe.checkpoint import optimizer_tensors

Tensors = dict[str, Tensor]


class Replicated:
    """Every process holds the whole model (a single process, or DDP).

    Attributes:
        holds_all: whether a process may call the bare model outside a step.
    """

    holds_all = True

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[Any, Any, Any]:
        """The model to call, the optimiser to step, and the bare optimiser, whose groups hold the learning rates."""
        optimizer = build(model)
        prepared, stepped = self.accelerator.prepare(model, optimizer)
        return prepared, stepped, optimizer

    def bare(self, model: Any) -> Any:
        """The model without its wrapper (accelerate's `unwrap_model` would import DeepSpeed)."""
        return getattr(model, "module", model)

    def synchronised(self, model: Any, last: bool) -> AbstractContextManager:
        """Around a micro-batch's forward and backward: gradients are exchanged at the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def backward(self, model: Any, loss: Tensor) -> None:
        """Add a micro-batch's gradient; gradients are averaged over the processes."""
        self.accelerator.backward(loss)

    def clip(self, model: Any, max_norm: float) -> Tensor:
        """Clip the gradient in place; returns its norm before."""
        return torch.as_tensor(self.accelerator.clip_grad_norm_(model.parameters(), max_norm))

    def weights(self, model: nn.Module) -> Tensors | None:
        """Whole weights by name for saving; None: the model holds them."""
        return None

    def moments(self, optimizer: Any) -> Tensors:
        """Whole tensors of the bare optimiser's state by "<parameter>.<state>"; all processes must call it."""
        return optimizer_tensors(optimizer, self.whole)

    def whole(self, value: Any) -> Tensor:
        """The whole of a tensor of the optimiser's state."""
        return torch.as_tensor(value)

    def load_weights(self, model: nn.Module, weights: Tensors) -> None:
        """Give the model whole weights; raises RuntimeError where they don't fit."""
        model.load_state_dict(weights)

    @contextmanager
    def restoring(self, optimizer: Any) -> Iterator[Any]:
        """What takes the place of the bare optimiser where a checkpoint is loaded: "param_groups" and "state"."""
        yield optimizer

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor of the optimiser's state of parameter `like`."""
        return value.to(like.device, copy=True)


def cast_forwards(model: nn.Module, device: torch.device) -> None:
    """Make every forward of a model run under bfloat16 autocast with outputs in float32, as accelerate does for DDP."""
    autocast = torch.autocast(device.type, torch.bfloat16)
    forward = convert_outputs_to_fp32(autocast(model.forward.__func__))  # type: ignore[attr-defined]
    model.forward = MethodType(forward, model)  # type: ignore[assignment]
