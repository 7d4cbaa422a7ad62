"""A model through torch.compile, piece by piece: the halves of each decoder layer, and the output layer with its loss.

By halves of layers, since the layers are alike: each is traced, but the code of one serves the others from a cache, and
whatever wraps layers (sharding, hooks) stays outside. Steps of the mask phase run the halves that route as they are
written: their thresholds move with every step, and each would be compiled anew.
"""

import functools
import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dsmoe.config.run import TrainSettings
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM
from dsmoe.trainer.compile_check import check_compiled
from dsmoe.trainer.parallel import Tensors

_LAUNCHER = "ACCELERATE_DYNAMO_BACKEND"
# routers read their layer's policy, so half a layer has a graph of its own, with gradients and without
_GRAPHS_OF_A_LAYER = 4


def settle_compile(train: TrainSettings) -> None:
    """Let a launcher's wish for torch.compile be the run's; accelerate would compile every step of the mask phase.

    Args:
        train: `compile` is replaced.

    Raises:
        UserError: the launcher asks for another compiler than inductor, or sharding rules compilation out.
    """
    backend = os.environ.get(_LAUNCHER, "no").lower()
    if backend not in ("no", "inductor"):
        raise UserError(
            f"the launch configuration has dynamo_backend {backend!r}; it must be 'no' or 'inductor' (train.compile)"
        )
    train.compile = train.compile or backend == "inductor"
    if train.compile and train.sharding == "zero3":
        raise UserError(
            "train.compile with train.sharding 'zero3', whose hooks inside a layer can't be compiled; use 'fsdp2' or "
            "'zero2'"
        )


class CompiledModel:
    """Compiles a model's pieces in place; parameters, names and checkpoints stay as they are.

    Args:
        model: the pieces' methods are replaced on the instances.
        device_type: where it runs.

    Raises:
        UserError: torch.compile doesn't work here.
    """

    def __init__(self, model: DSMoEForCausalLM, device_type: str) -> None:
        _probe(device_type)
        self._model = model
        layers = list(model.model.layers)
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, _GRAPHS_OF_A_LAYER * len(layers))  # type: ignore[attr-defined]
        limits.accumulated_recompile_limit = max(  # type: ignore[attr-defined]
            limits.accumulated_recompile_limit,
            limits.recompile_limit,  # type: ignore[attr-defined]
        )
        pieces: list[tuple[nn.Module, str]] = [
            (layer, name) for layer in layers for name in ("attend", "mix")
        ]
        self._compiled = {
            (piece, name): torch.compile(getattr(piece, name), dynamic=False)
            for piece, name in [*pieces, (model, "judge")]
        }
        self._replace()

    def _replace(self) -> None:
        for (piece, name), compiled in self._compiled.items():
            setattr(piece, name, compiled)

    @contextmanager
    def as_written(self, names: Collection[str] = ("attend", "mix", "judge")) -> Iterator[None]:
        """Inside, the pieces of these names run without the compiler."""
        for piece, name in self._compiled:
            if name in names:
                delattr(piece, name)
        try:
            yield
        finally:
            self._replace()

    def moving_thresholds(self) -> AbstractContextManager[None]:
        """Inside, what routes runs without the compiler, which would compile it anew for every threshold."""
        routed = self._model.config.num_attention_experts > 1
        return self.as_written(("attend", "mix") if routed else ("mix",))

    def check(self, batch: Tensors, accelerator: Accelerator) -> None:
        """Compare the compiled model's gradients on a micro-batch with those of the model as written.

        Raises:
            UserError: they are others.
        """
        check_compiled(self._model, self.as_written, batch, accelerator)


class Uncompiled:
    """The same of a model that no compiler has touched."""

    def as_written(self) -> AbstractContextManager[None]:
        """As it is anyway."""
        return nullcontext()

    def moving_thresholds(self) -> AbstractContextManager[None]:
        """As it is anyway."""
        return nullcontext()

    def check(self, batch: Tensors, accelerator: Accelerator) -> None:
        """Nothing to compare."""


@functools.cache
def _probe(device_type: str) -> None:
    """Compile something small both ways: a missing compiler is told in one line, before the first step."""
    x = torch.ones(8, device=device_type, requires_grad=True)
    try:
        torch.compile(_small, dynamic=False)(x).sum().backward()
    except Exception as error:  # the compiler stack's errors have no common base but this
        message = " ".join(str(error).split())[:200]
        raise UserError(
            f"train.compile is true, and torch.compile doesn't work here ({type(error).__name__}: {message}); it needs "
            f"{'Triton' if device_type == 'cuda' else 'a C++ compiler'}: install that, or set train.compile false"
        ) from None


def _small(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * x
