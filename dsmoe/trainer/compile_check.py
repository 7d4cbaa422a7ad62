"""Whether a compiled model computes what the model as written does, found out on a run's own first batch.

A compiler that is wrong says nothing: torch 2.13's once trained SMoEs whose experts got no gradients (see
`dsmoe.model.routing`), and only their loss told. Rounding in bfloat16 moves a parameter's gradient by 1% to 4% (measured
on CPU at 1.6M parameters, all kinds of model), far from `TOLERANCE`.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor

from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, model_inputs
from dsmoe.trainer.parallel import Tensors

Gradients = dict[str, Tensor | None]

# relative error of a parameter's gradient from which on the compiler is refused
TOLERANCE = 0.5
# parameters whose gradients are below this share of the whole are rounding noise alone
NEGLIGIBLE = 1e-6


def check_compiled(
    model: DSMoEForCausalLM,
    as_written: Callable[[], AbstractContextManager[None]],
    batch: Tensors,
    accelerator: Accelerator,
) -> None:
    """Compare the gradients of the language-modelling loss; nothing of the model or its optimiser changes.

    Args:
        model: compiled, whole on this process, unwrapped, in training mode.
        as_written: inside, it runs without the compiler.
        batch: a micro-batch, as the first step reads it.
        accelerator: whose autocast the run has.

    Raises:
        UserError: a parameter's gradient is another one.
    """
    name, error = "", 0.0
    try:
        with as_written():
            expected = _gradients(model, batch, accelerator)
        found = _gradients(model, batch, accelerator)
        name, error = max(_errors(found, expected), key=lambda pair: pair[1], default=(name, error))
    except torch.OutOfMemoryError:
        # as written a model takes more memory, and two sets of gradients do; what can't be checked may still train
        accelerator.print("note: not enough memory to check the compiler against the model as written")
    # all processes end together
    worst = float(accelerator.gather(torch.tensor([error], device=accelerator.device)).max())
    if worst > TOLERANCE:
        raise UserError(
            f"train.compile is true, and the compiler of torch {torch.__version__} ({accelerator.device.type}) gets the "
            f"gradient of {name or 'a parameter'} wrong by {worst:.0%}; set train.compile false, or use another torch"
        )


def _gradients(model: DSMoEForCausalLM, batch: Tensors, accelerator: Accelerator) -> Gradients:
    parameters = dict(model.named_parameters())
    labels = batch["shift_labels"]
    with accelerator.autocast():
        # the arguments of a training step, whose graphs these are
        loss = model(
            **model_inputs(batch),
            shift_labels=labels,
            num_items_in_batch=(labels != -100).sum().clamp(min=1),
            use_cache=False,
        ).loss
    # no hooks run and no .grad is touched
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients))


def _errors(found: Gradients, expected: Gradients) -> Iterator[tuple[str, float]]:
    """The relative error of each parameter's gradient; one that is not a number is infinite."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items() if gradient is not None}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    for name, norm in norms.items():
        if norm <= NEGLIGIBLE * whole:
            continue
        gradient, right = found[name], expected[name]
        error = 1.0 if gradient is None or right is None else float((gradient - right).norm()) / norm
        yield name, error if error == error else float("inf")
