"""Bytes of weights, KV cache and training state from the config alone."""

from typing import Any

from dsmoe.accounting.parameters import total_parameters
from dsmoe.accounting.sizes import MeanActive, active_experts, layer_sizes, stored_experts
from dsmoe.errors import UserError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "int8": 1}
# Moments that an optimizer keeps per parameter.
OPTIMIZER_MOMENTS = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element.

    Raises:
        UserError: an unknown dtype.
    """
    if dtype not in DTYPE_BYTES:
        raise UserError(f"unknown dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def weight_bytes(config: Any, dtype: str = "bfloat16") -> int:
    """Bytes of all weights: what a model occupies, whatever share of it a token uses.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        dtype: dtype of the weights, one of `DTYPE_BYTES`.
    """
    return total_parameters(config) * dtype_bytes(dtype)


def active_weight_bytes(
    config: Any, dtype: str = "bfloat16", mean_active: MeanActive | None = None, batch_size: int = 1
) -> int:
    """Bytes of weights that one decoding step of a batch reads.

    Counts the layers, the final norm, the whole output projection and, where it is a separate table, one row
    of the input embedding per sequence. Sequences of a batch choose different experts; if each keeps any
    given expert with probability f = active / M, independently and equally for all M experts that a layer stores
    (an assumption: real routers are correlated and uneven, which reads fewer), a step reads
    ``M * (1 - (1 - f)**batch_size)`` of them.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        dtype: dtype of the weights, one of `DTYPE_BYTES`.
        mean_active: measured mean active experts, as in `count_parameters`.
        batch_size: sequences decoded together.

    Raises:
        UserError: a threshold or top_p policy without its measured mean, or an unknown dtype.
    """
    sizes = layer_sizes(config)

    def share_read(part: str, num_experts: int) -> float:
        kept, stored = active_experts(config, part, mean_active), stored_experts(config, part)
        read = (held * (1 - (1 - active / held) ** batch_size) for active, held in zip(kept, stored))
        return sum(read) / num_experts

    always = config.num_hidden_layers * (sizes.key_value + sizes.router + sizes.norm) + config.hidden_size
    experts = sizes.query_output * share_read("attention", sizes.num_attention_experts)
    experts += sizes.mlp * share_read("mlp", sizes.num_experts)
    embedding = config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        embedding += batch_size * config.hidden_size
    return (always + round(experts) + embedding) * dtype_bytes(dtype)


def kv_cache_bytes(config: Any, context_length: int, batch_size: int = 1, dtype: str = "bfloat16") -> int:
    """Bytes of the KV cache: ``2 * layers * kv_heads * head_dim * context_length * batch_size`` elements.

    Attention experts share keys and values, so the cache does not grow with their number.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        context_length: tokens kept per sequence.
        batch_size: sequences.
        dtype: dtype of keys and values, one of `DTYPE_BYTES`.
    """
    sizes = layer_sizes(config)
    per_token = 2 * config.num_hidden_layers * sizes.num_key_value_heads * sizes.head_dim
    return per_token * context_length * batch_size * dtype_bytes(dtype)


def training_memory_bytes(
    config: Any,
    optimizer: str = "adamw",
    dtype: str = "float32",
    gradient_dtype: str | None = None,
    moment_dtype: str | None = None,
    master_dtype: str | None = None,
) -> int:
    """Bytes of parameters, gradients and optimizer moments, over all devices together.

    Activations are EXCLUDED (they depend on batch, sequence length and checkpointing), and so are temporary
    buffers and the allocator's overhead: this is a lower bound. Autocast training in bfloat16 keeps float32
    parameters: use the default dtypes.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        optimizer: "adamw" (two moments), "sgd_momentum" (one) or "sgd" (none).
        dtype: dtype of the parameters, one of `DTYPE_BYTES`.
        gradient_dtype: dtype of the gradients; None: as the parameters.
        moment_dtype: dtype of the moments; None: as the parameters, as torch's optimizers do.
        master_dtype: dtype of a second, precise copy of the parameters, as DeepSpeed keeps; None: no copy.

    Raises:
        UserError: an unknown optimizer or dtype.
    """
    if optimizer not in OPTIMIZER_MOMENTS:
        raise UserError(f"unknown optimizer {optimizer!r}; known are {', '.join(OPTIMIZER_MOMENTS)}")
    per_parameter = dtype_bytes(dtype) + dtype_bytes(gradient_dtype or dtype)
    per_parameter += OPTIMIZER_MOMENTS[optimizer] * dtype_bytes(moment_dtype or dtype)
    if master_dtype is not None:
        per_parameter += dtype_bytes(master_dtype)
    return total_parameters(config) * per_parameter
