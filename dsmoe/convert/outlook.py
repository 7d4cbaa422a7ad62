"""What a split model can be exported to later, so that nobody learns it only after the training."""

import copy

from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.export.gguf.forms import gguf_architecture
from dsmoe.export.requirements import check_exportable


def export_formats(config: DSMoEConfig) -> tuple[list[str], str]:
    """The formats of other tools that hold a model once every token keeps one K.

    Args:
        config: of a model with experts.

    Returns:
        The formats of `dsmoe export` but its own, and why the first of the others is none; "" where there is none.
    """
    sparse = copy.deepcopy(config)
    sparse.mlp_routing = [{"policy": "top_k", "k": 1}] * config.num_hidden_layers
    native = "olmoe" if config.qk_norm == "full" else "qwen2moe"
    formats, reason = [], ""
    for target in (native, "gguf"):
        try:
            if target == "gguf":
                gguf_architecture(sparse)
            else:
                check_exportable(sparse, target)
            formats.append(target)
        except UserError as error:
            reason = reason or str(error)
    return formats, reason


def outlook(config: DSMoEConfig) -> str:
    """The same in one line, with what of `dsmoe split` would change it."""
    formats, reason = export_formats(config)
    if formats:
        line = f"once sparsified with one K (--policy top_k) it can be exported to {' and '.join(formats)}"
        return f"{line}; not to gguf: {reason}" if reason else line
    softmax = copy.deepcopy(config)
    softmax.gate_normalization = "softmax"
    others, reason_there = export_formats(softmax)
    if others:
        return (
            f"its gates ({config.gate_normalization}) can't be exported to stock formats or GGUF; with "
            f"--gate-normalization softmax they can, to {' and '.join(others)}"
        )
    return f"it can't be exported to stock formats or GGUF: {reason_there}"
