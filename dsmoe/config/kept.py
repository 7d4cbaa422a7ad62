"""Which experts of each layer are stored: after some were removed, only the others have weights.

The router keeps its N outputs and the softmax runs over all N, so removing an expert changes no gate of the others.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from dsmoe.errors import UserError


def kept_per_layer(value: Any, num_layers: int, num_experts: int, where: str) -> list[list[int]] | None:
    """One checked list of the experts that are stored per layer, or None where no layer has removed any.

    Args:
        value: None (all), or one entry per layer: ascending indices from 0 to N - 1, or None (all of that layer).
        num_layers: layers of the model.
        num_experts: N, experts of a layer before any was removed.
        where: what to call it in an error.

    Raises:
        UserError: not of that form, or a layer without any expert.
    """
    if value is None:
        return None
    if not _is_list(value) or len(value) != num_layers:
        found = f"{len(value)} entries" if _is_list(value) else repr(value)
        raise UserError(
            f"{where}: {found} for {num_layers} layers; give null (all experts) or one list of experts per layer"
        )
    kept = [_kept_of_layer(entry, num_experts, f"{where}[{layer}]") for layer, entry in enumerate(value)]
    return None if all(len(entry) == num_experts for entry in kept) else kept


def _kept_of_layer(entry: Any, num_experts: int, where: str) -> list[int]:
    if entry is None:
        return list(range(num_experts))
    if not _is_list(entry):
        raise UserError(f"{where} is {entry!r}; it must be a list of experts")
    if not entry:
        raise UserError(f"{where} is empty; every layer keeps at least one expert")
    for expert in entry:
        if isinstance(expert, bool) or not isinstance(expert, int) or not 0 <= expert < num_experts:
            raise UserError(f"{where}: expert {expert!r}; it must be an integer from 0 to {num_experts - 1}")
    for before, expert in pairwise(entry):
        if expert <= before:
            raise UserError(f"{where}: expert {expert} stands after {before}; give them ascending, each once")
    return list(entry)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
