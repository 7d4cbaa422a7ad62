"""The layout of weights on disk, and their initial values.

On disk, stacked output projections follow transformers: [N, D, F] for experts, [A, D, W] for attention experts.
In memory they are [N, F, D] and [A, W, D]. transformers applies the conversions below in `from_pretrained` and
reverts them in `save_pretrained`. Both layouts have one shape where F = D, so nothing but these rules tells them
apart: `check_dims` must stay off.
"""

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

from dsmoe.model.experts import Experts
from dsmoe.model.moa import MixtureOfHeads

TRANSPOSED_ON_DISK = ("mlp.experts.down_proj", "self_attn.experts_o_proj")


def register_disk_layout(model_type: str) -> None:
    """Tell transformers how checkpoints of `model_type` differ from the model in memory."""
    converters = [
        WeightConverter(source_patterns=name, target_patterns=name, operations=[Transpose(1, 2)])
        for name in TRANSPOSED_ON_DISK
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


@torch.no_grad()
def initialise_experts(module: Experts, std_in: float, std_out: float) -> None:
    """Draw the experts' weights so that, of one seed, their sum with gates of one equals the dense twin's MLP.

    The draw is made in the twin's order (all gate rows, then all up rows) and dealt out to the experts.
    """
    weight = module.input_proj
    num_experts, height, hidden = weight.shape
    parts = 2 if module.mlp_type == "swiglu" else 1
    drawn = weight.new_empty(parts, num_experts, height // parts, hidden).normal_(0.0, std_in)
    _set(weight, drawn.transpose(0, 1).reshape(weight.shape))
    _set(module.down_proj, torch.empty_like(module.down_proj).normal_(0.0, std_out))


@torch.no_grad()
def initialise_heads(module: MixtureOfHeads, std_in: float, std_out: float) -> None:
    """The same for attention experts: the twin's query heads stand in order of their KV head."""
    for weight, std in ((module.experts_q_proj, std_in), (module.experts_o_proj, std_out)):
        experts, width, hidden = weight.shape
        heads = module.heads_per_expert
        drawn = weight.new_empty(heads, experts, width // heads, hidden)
        if weight is module.experts_q_proj:
            drawn.normal_(0.0, std)
        else:
            # the twin's o_proj is [D, H * hd], drawn row by row
            flat = weight.new_empty(hidden, experts * width).normal_(0.0, std)
            drawn.copy_(flat.T.reshape(drawn.shape))
        _set(weight, drawn.transpose(0, 1).reshape(weight.shape))


def _set(parameter: Tensor, value: Tensor) -> None:
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)
