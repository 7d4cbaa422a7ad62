"""Keys and values in memory that is taken before the first token; a cache that is continued beyond it grows.

Shapes: B batch, K key/value heads, L slots, hd head_dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.model.kernels.huge_pages import use_huge_pages


class PreallocatedLayer(DynamicLayer):
    """One layer: behaves as transformers' growing cache, with `keys` and `values` as views of the filled slots.

    Args:
        key_slots: [B, K, L, hd].
        value_slots: likewise.
    """

    is_croppable = True

    def __init__(self, key_slots: Tensor, value_slots: Tensor) -> None:
        super().__init__()
        self.key_slots, self.value_slots = key_slots, value_slots
        self.dtype, self.device = key_slots.dtype, key_slots.device
        self.is_initialized = True
        self.fill(0)

    def fill(self, length: int) -> None:
        """Say that the first `length` slots are filled."""
        self.keys, self.values = self.key_slots[:, :, :length], self.value_slots[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, K, S, hd], making more slots where they are too few; returns all that are there."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self.key_slots.shape[-2]:
            # half as many again, so that token after token copies each only a few times
            length = end * 3 // 2
            self.key_slots, self.value_slots = _longer(self.keys, length), _longer(self.values, length)
        self.key_slots[:, :, start:end] = key_states
        self.value_slots[:, :, start:end] = value_states
        self.fill(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Filled slots."""
        return self.keys.shape[-2]

    def reset(self) -> None:
        """Empty it."""
        self.fill(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not possible in place."""
        raise UserError(
            "a preallocated cache can't change its batch; beam search needs transformers' own cache"
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not possible in place."""
        self.batch_repeat_interleave(1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not possible in place."""
        self.batch_repeat_interleave(1)


def _longer(filled: Tensor, length: int) -> Tensor:
    """Slots [B, K, length, hd] that begin with the filled ones."""
    batch, heads, count, size = filled.shape
    slots = filled.new_empty(batch, heads, length, size)
    slots[:, :, :count] = filled
    return slots


class PreallocatedCache(Cache):
    """The cache of a model, for `past_key_values`. A `Decoder` never grows it.

    Args:
        config: of the model.
        batch_size: B.
        max_length: L.
        dtype: of keys and values.
        device: theirs.
    """

    layers: list[Any]

    def __init__(
        self,
        config: DSMoEConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (
            config.num_hidden_layers,
            2,
            batch_size,
            config.num_key_value_heads,
            max_length,
            config.head_dim,
        )
        # no zeros: only filled slots are read, and unused pages then take no memory
        slots = torch.empty(shape, dtype=dtype, device=device)
        if slots.device.type == "cpu":
            use_huge_pages(slots)
        layers: list[Any] = [PreallocatedLayer(keys, values) for keys, values in slots]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.key_slots.nbytes + layer.value_slots.nbytes for layer in self.layers)

    def fill(self, length: int) -> None:
        """Say that the first `length` slots of every layer are filled."""
        for layer in self.layers:
            layer.fill(length)

    def rows(self, first: int, last: int) -> Cache:
        """An empty cache of sequences [first, last) alone, in the same memory."""
        return Cache(
            layers=[
                PreallocatedLayer(layer.key_slots[first:last], layer.value_slots[first:last])
                for layer in self.layers
            ]
        )
