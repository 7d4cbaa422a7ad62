"""Accounting from the config alone: parameters, FLOPs and memory. Imports neither torch nor transformers.

The paper's nine models are compared in `dsmoe.accounting.paper`, which reads configs and is imported
separately.
"""

from dsmoe.accounting.flops import (
    ForwardFlops,
    forward_flops_per_token,
    inference_flops_per_token,
    training_flops_per_token,
    training_forward_flops_per_token,
)
from dsmoe.accounting.memory import (
    active_weight_bytes,
    dtype_bytes,
    kv_cache_bytes,
    training_memory_bytes,
    weight_bytes,
)
from dsmoe.accounting.parameters import LayerCounts, ParameterCounts, count_parameters, total_parameters
from dsmoe.accounting.sizes import (
    LayerSizes,
    active_experts,
    embedding_parameters,
    layer_sizes,
    router_parameters,
    stored_experts,
)
from dsmoe.accounting.table import markdown_table

__all__ = [
    "ForwardFlops",
    "LayerCounts",
    "LayerSizes",
    "ParameterCounts",
    "active_experts",
    "active_weight_bytes",
    "count_parameters",
    "dtype_bytes",
    "embedding_parameters",
    "forward_flops_per_token",
    "inference_flops_per_token",
    "kv_cache_bytes",
    "layer_sizes",
    "markdown_table",
    "router_parameters",
    "stored_experts",
    "total_parameters",
    "training_flops_per_token",
    "training_forward_flops_per_token",
    "training_memory_bytes",
    "weight_bytes",
]
