"""The recompute option of the dense expert path, for a whole model."""

from torch import nn

from dsmoe.model.experts import Experts


def set_recompute(model: nn.Module, recompute: bool) -> int:
    """Choose whether the experts of a model keep their pre-activations for the backward pass.

    Without them a layer saves about its input alone; its backward pass computes them again, block by block: 11
    GEMMs instead of 9. Dense mode only; experts that run sparsely ignore it. It is no part of the config: results
    are the same but for rounding.

    Args:
        model: holds `Experts`, or stock transformers experts that run as "dsmoe_wide".
        recompute: compute them again (True) or keep them (False, the default of every model).

    Returns:
        How many modules were set.
    """
    modules = [
        module
        for module in model.modules()
        # `_is_expert_parallel` marks the classes under transformers' use_experts_implementation
        if isinstance(module, Experts) or hasattr(module, "_is_expert_parallel")
    ]
    for module in modules:
        module.recompute = recompute  # type: ignore[assignment]
    return len(modules)
