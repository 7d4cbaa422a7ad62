"""The layout of weights on disk.

On disk, stacked output projections follow transformers: [N, D, F] for experts, [A, D, W] for attention experts.
In memory they are [N, F, D] and [A, W, D]. transformers applies the conversions below in `from_pretrained` and
reverts them in `save_pretrained`. Both layouts have one shape where F = D, so nothing but these rules tells them
apart: `check_dims` must stay off.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

TRANSPOSED_ON_DISK = ("mlp.experts.down_proj", "self_attn.experts_o_proj")


def register_disk_layout(model_type: str) -> None:
    """Tell transformers how checkpoints of `model_type` differ from the model in memory."""
    converters: list[WeightConverter | WeightRenaming] = [
        WeightConverter(source_patterns=name, target_patterns=name, operations=[Transpose(1, 2)])
        for name in TRANSPOSED_ON_DISK
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)
