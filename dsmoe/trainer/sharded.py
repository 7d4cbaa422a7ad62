"""Shards by torch's `fully_shard` (FSDP2)."""

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

from dsmoe.trainer.parallel import Replicated, Tensors, cast_forwards


class Sharded(Replicated):
    """Every process holds a part of each parameter, its gradient and its moments (torch's `fully_shard`)."""

    holds_all = False

    def __init__(self, accelerator: Accelerator, precision: str = "f32") -> None:
        super().__init__(accelerator)
        self.precision = precision
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))

    def prepare(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[Any, Any, Any]:
        """Shard layer by layer; the optimiser is built on the shards."""
        model = model.to(self.accelerator.device)
        if self.precision == "bf16":
            cast_forwards(model, self.accelerator.device)
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
        tied = (
            dict(model.named_parameters(remove_duplicate=False)).keys()
            - dict(model.named_parameters()).keys()
        )
        return {name: tensor for name, tensor in whole.items() if name not in tied}

    def whole(self, value: Any) -> Tensor:
        """See `Replicated.whole`; all processes must call it, and only the main one keeps the result, off the GPU."""
        if not isinstance(value, DTensor):
            return torch.as_tensor(value)
        full = value.full_tensor()
        return full.cpu() if self.accelerator.is_main_process else full.new_empty(0)

    def load_weights(self, model: nn.Module, weights: Any) -> None:
        """See `Replicated.load_weights`; every process reads the whole file."""
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """See `Replicated.part`."""
        if isinstance(like, DTensor) and value.shape == like.shape:
            return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
        return value.to(like.device, copy=True)


def shard_dim(shape: torch.Size, processes: int) -> int:
    """The dimension to shard: the first that divides evenly, otherwise the first.

    Experts are stacked as [N, H, D]: along the first dimension memory would stop falling at N processes.

    Args:
        shape: of the parameter.
        processes: how many share it.
    """
    return next((dim for dim, size in enumerate(shape) if size >= processes and size % processes == 0), 0)
