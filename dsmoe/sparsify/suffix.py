"""Running a part of a model: from a layer's input to the final hidden states, and what the layers saw on the way.

Shapes: B batch, S positions, D hidden size, N experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor

from dsmoe.model import DSMoEForCausalLM, model_inputs
from dsmoe.model.experts import Experts

# below this share of kept pairs, computing only them is quicker than one wide product with zero gates
GROUPED_BELOW = 0.3


class Pass(NamedTuple):
    """One forward pass.

    Attributes:
        hidden: [B, S, D] after the final norm.
        inputs: the input [B, S, D] of every layer that ran.
        router_logits: {"mlp" | "attention": one [B, S, N] per layer that ran}; parts without a router are absent.
    """

    hidden: Tensor
    inputs: list[Tensor]
    router_logits: dict[str, tuple[Tensor, ...]]


@contextmanager
def layers_from(model: DSMoEForCausalLM, start: int, stop: int | None = None) -> Iterator[None]:
    """Within the block the decoder consists of layers start, ..., stop - 1 alone."""
    body: Any = model.model
    whole = body.layers
    body.layers = whole[start:stop]
    try:
        yield
    finally:
        body.layers = whole


@contextmanager
def fast_masking(model: DSMoEForCausalLM) -> Iterator[None]:
    """Within the block MLP experts run as one wide product wherever that is quicker.

    Gates of dropped experts are zero, so that the result is the same but for rounding.
    """

    def without_mask(module: Any, args: tuple) -> tuple | None:
        if len(args) < 3 or args[2] is None or args[2].float().mean() < GROUPED_BELOW:
            return None
        return args[:2]

    hooks = [
        module.register_forward_pre_hook(without_mask)
        for module in model.modules()
        if isinstance(module, Experts)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_layers(
    model: DSMoEForCausalLM,
    batch: dict[str, Tensor],
    start: int = 0,
    hidden: Tensor | None = None,
    keep_inputs: bool = False,
) -> Pass:
    """Run the decoder with the policies of its config.

    Args:
        model: in evaluation mode.
        batch: of `evaluation_batches`.
        start: first layer to run.
        hidden: [B, S, D] its input; None: the embeddings (start is 0).
        keep_inputs: collect every layer's input.
    """
    inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
    seen: list[Tensor] = []
    hooks = []
    with layers_from(model, start):
        if hidden is not None:
            # for its shape; the layer itself is handed what the forward pass must not normalise as embeddings
            inputs["inputs_embeds"] = hidden
            inputs.pop("input_ids")
            first: Any = model.model.layers[0]
            hooks.append(first.register_forward_pre_hook(lambda module, args: (hidden, *args[1:])))
        if keep_inputs:
            for layer in model.model.layers:
                hooks.append(layer.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
        try:
            outputs = model.model(**inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    logits = {"mlp": outputs.router_logits, "attention": outputs.attention_router_logits}
    return Pass(
        outputs.last_hidden_state, seen, {part: value for part, value in logits.items() if value is not None}
    )
