"""Bytes of weights, KV cache and training state of a shape that need not be whole yet.

For a shape that is whole these agree with what `dsmoe.accounting` counts of the configuration that a plan writes.
"""

from dataclasses import dataclass

from dsmoe.accounting import dtype_bytes
from dsmoe.errors import UserError
from dsmoe.planner.shapes import HEAD_DIM, Family

LONG_NAMES = {
    "f64": "float64", "f32": "float32", "fp32": "float32", "bf16": "bfloat16", "f16": "float16",
    "fp16": "float16", "f8": "float8", "fp8": "float8",
}  # fmt: skip
SHORT_NAMES = ("f32", "bf16", "f16", "fp8", "int8", "int4")

# Bytes per parameter, by part. Activations come on top: they depend on batch, sequence length and checkpointing.
TRAINING_RECIPES = {
    # autocast, as this project's trainer works: everything is kept in 32 bits
    "autocast": {"weights": 4, "gradients": 4, "adamw_moments": 8},
    # DeepSpeed and Megatron: 16-bit weights and gradients, and a 32-bit copy of the weights
    "master-copy": {"weights": 2, "gradients": 2, "master_weights": 4, "adamw_moments": 8},
    "master-copy-f32-gradients": {"weights": 2, "gradients": 4, "master_weights": 4, "adamw_moments": 8},
}


def element_bytes(dtype: str, flag: str = "--dtype") -> float:
    """Bytes of one element; 0.5 for int4 (scales of quantisation are not counted).

    Raises:
        UserError: an unknown dtype.
    """
    name = dtype.lower()
    if name == "int4":
        return 0.5
    try:
        return float(dtype_bytes(LONG_NAMES.get(name, name)))
    except UserError:
        raise UserError(f"{flag} {dtype!r} is unknown; known are {', '.join(SHORT_NAMES)}") from None


@dataclass(frozen=True)
class Serving:
    """What a deployed model holds besides its weights, and in which precision.

    Args:
        context_length: tokens kept per sequence; 0: no KV cache is counted.
        batch_size: sequences at a time.
        dtype: of the weights.
        kv_dtype: of keys and values; empty: as the weights, but bf16 for integer weights.
    """

    context_length: int = 0
    batch_size: int = 1
    dtype: str = "bf16"
    kv_dtype: str = ""

    @property
    def cache_dtype(self) -> str:
        """Precision of keys and values."""
        return self.kv_dtype or ("bf16" if self.dtype.lower().startswith("int") else self.dtype)

    def weight_bytes(self, family: Family, hidden_size: float) -> float:
        """All weights, whatever share of them a token uses."""
        return family.num_params_stored(hidden_size) * element_bytes(self.dtype)

    def kv_cache_bytes(self, hidden_size: float) -> float:
        """Keys and values of multi-head attention: 2 * layers * d elements per token."""
        elements = 2.0 * (hidden_size / HEAD_DIM) * hidden_size * self.context_length * self.batch_size
        return elements * element_bytes(self.cache_dtype, "--kv-dtype")

    def total_bytes(self, family: Family, hidden_size: float) -> float:
        """Weights and KV cache."""
        return self.weight_bytes(family, hidden_size) + self.kv_cache_bytes(hidden_size)


def training_parts(family: Family, hidden_size: float, recipe: str = "autocast") -> dict[str, float]:
    """Bytes of parameters, gradients and AdamW moments over all devices together; without activations.

    Raises:
        UserError: an unknown recipe.
    """
    if recipe not in TRAINING_RECIPES:
        raise UserError(f"--training-recipe {recipe!r} is unknown; known are {', '.join(TRAINING_RECIPES)}")
    stored = family.num_params_stored(hidden_size)
    return {part: size * stored for part, size in TRAINING_RECIPES[recipe].items()}
