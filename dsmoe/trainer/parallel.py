"""How the processes of a run share a model: copies that average gradients (DDP), or shards (FSDP2).

A strategy prepares model and optimiser, says when gradients are synchronised, clips them, and gathers whole weights and
moments for checkpoints, which are the same files whatever wrote them: a run may be resumed on another number of processes
or with the other strategy.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

Tensors = dict[str, Tensor]


class Replicated:
    """Every process holds the whole model (a single process, or DDP)."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[Any, Any, Any]:
        """The model to call, the optimiser to step, and the bare optimiser."""
        optimizer = build(model)
        prepared, stepped = self.accelerator.prepare(model, optimizer)
        return prepared, stepped, optimizer

    def synchronised(self, model: Any, last: bool) -> AbstractContextManager:
        """Around a micro-batch's forward and backward: gradients are exchanged at the last one only."""
        return nullcontext() if last else self.accelerator.no_sync(model)

    def clip(self, model: Any, max_norm: float) -> Tensor:
        """Clip the gradient in place; returns its norm before."""
        return torch.as_tensor(self.accelerator.clip_grad_norm_(model.parameters(), max_norm))

    def weights(self, model: nn.Module) -> Tensors | None:
        """Whole weights by name for saving; None: the model holds them."""
        return None

    def whole(self, value: Any) -> Tensor:
        """The whole of a tensor of the optimiser's state."""
        return torch.as_tensor(value)

    def load_weights(self, model: nn.Module, weights: Tensors) -> None:
        """Give the model whole weights; raises RuntimeError where they don't fit."""
        model.load_state_dict(weights)

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """This process's part of a whole tensor of the optimiser's state of parameter `like`."""
        return value.to(like.device, copy=True)


class Sharded(Replicated):
    """Every process holds a part of each parameter, its gradient and its moments (torch's `fully_shard`)."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))

    def prepare(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[Any, Any, Any]:
        """Shard layer by layer; the optimiser is built on the shards."""
        model = model.to(self.accelerator.device)
        processes = self.accelerator.num_processes
        for layer in model.model.layers:  # type: ignore[union-attr]
            fully_shard(
                layer, mesh=self.mesh, shard_placement_fn=lambda p: Shard(shard_dim(p.shape, processes))
            )
        fully_shard(model, mesh=self.mesh, shard_placement_fn=lambda p: Shard(shard_dim(p.shape, processes)))
        # elsewhere FSDP2 is known to leave a model whole without a word
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        optimizer = build(model)
        return model, optimizer, optimizer

    def synchronised(self, model: Any, last: bool) -> AbstractContextManager:
        """See `Replicated.synchronised`."""
        model.set_requires_gradient_sync(last)
        return nullcontext()

    def clip(self, model: Any, max_norm: float) -> Tensor:
        """See `Replicated.clip`; the norm is that of the whole gradient."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self, model: nn.Module) -> Tensors | None:
        """Gathered in the main process; the others get {}. All must call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole: Any = get_model_state_dict(model, options=options)
        return whole

    def whole(self, value: Any) -> Tensor:
        """See `Replicated.whole`; all processes must call it."""
        return value.full_tensor() if isinstance(value, DTensor) else torch.as_tensor(value)

    def load_weights(self, model: nn.Module, weights: Any) -> None:
        """See `Replicated.load_weights`; every process reads the whole file."""
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """See `Replicated.part`."""
        if isinstance(like, DTensor) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value.to(like.device, copy=True)


def strategy(accelerator: Accelerator, sharding: str) -> Replicated:
    """The strategy that `train.sharding` names; a single process has nothing to share."""
    if sharding == "fsdp2" and accelerator.num_processes > 1:
        return Sharded(accelerator)
    return Replicated(accelerator)


def shard_dim(shape: torch.Size, processes: int) -> int:
    """The dimension to shard: the first that divides evenly, otherwise the first.

    Experts are stacked as [N, H, D]: along the first dimension memory would stop falling at N processes.

    Args:
        shape: of the parameter.
        processes: how many share it.
    """
    return next((dim for dim, size in enumerate(shape) if size >= processes and size % processes == 0), 0)
