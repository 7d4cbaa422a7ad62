"""Self-attention: ordinary (grouped-query) attention, and what it shares with the mixture of heads (`moa`).

Shapes: B batch, S positions, D hidden size, H query heads, K key/value heads, hd head_dim.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsmoe.config import DSMoEConfig
from dsmoe.model.initial import mark
from dsmoe.model.norm import RMSNorm
from dsmoe.model.rotary import rotate


def eager_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention, for `attn_implementation="eager"`.

    Args:
        module: has `num_key_value_groups`.
        query: [B, H, S, hd].
        key: [B, K, L, hd].
        value: [B, K, L, hd].
        attention_mask: additive [B, 1, S, L], or None.
        scaling: factor of the scores.

    Returns:
        output [B, S, H, hd] and weights [B, H, S, L].
    """
    groups = module.num_key_value_groups
    scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), weights


class KeyValueAttention(nn.Module):
    """The shared part: keys, values, their cache and the attention call."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True
        width = config.num_key_value_heads * config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        mark(self.k_proj, "key", layer_idx)
        mark(self.v_proj, "value", layer_idx)
        if config.qk_norm == "full":
            self.q_norm = RMSNorm(config.num_attention_heads * config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(width, config.rms_norm_eps)
        elif config.qk_norm == "per_head":
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def split_heads(self, x_BSW: Tensor, norm: str) -> Tensor:
        """[B, S, heads * hd] to [B, heads, S, hd], normalised by the module called `norm` where there is one."""
        if self.config.qk_norm == "full" and norm:
            x_BSW = getattr(self, norm)(x_BSW)
        heads = x_BSW.unflatten(-1, (-1, self.head_dim))
        if self.config.qk_norm == "per_head" and norm:
            heads = getattr(self, norm)(heads)
        return heads.transpose(1, 2)

    def keys_and_values(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, past_key_values: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, L, hd] of every token, whatever the routing policy, with those of the cache."""
        key = rotate(self.split_heads(self.k_proj(x_BSD), "k_norm"), cos, sin)
        value = self.split_heads(self.v_proj(x_BSD), "")
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        return key, value

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        module: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention by the implementation of the config.

        Args:
            query: [B, H, S, hd].
            key: [B, K, L, hd].
            value: [B, K, L, hd].
            attention_mask: as made by transformers' `create_causal_mask`.
            module: stands for this module where the number of query heads is not the config's.
            **kwargs: passed on.

        Returns:
            output [B, S, H, hd] and, where the implementation gives them, weights.
        """
        implementation = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        out, weights = implementation(
            module or self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        batch, heads, length, _ = query.shape
        return out.reshape(batch, length, heads, -1), weights  # vLLM's has the shape [B * S, H * hd]


class Attention(KeyValueAttention):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        width = config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        mark(self.q_proj, "query", layer_idx)
        mark(self.o_proj, "output", layer_idx)

    def forward(
        self,
        x_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Attention output [B, S, D], weights where available, and no router logits."""
        query = rotate(self.split_heads(self.q_proj(x_BSD), "q_norm"), *position_embeddings)
        key, value = self.keys_and_values(x_BSD, *position_embeddings, past_key_values)
        out, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(out.flatten(2)), weights, None


def refuse_rows_of_documents(
    implementation: str | None, position_ids: Tensor, mask: Any, cache: Cache | None
) -> None:
    """Refuse what transformers' flash attention would silently read as one document a row.

    It looks for documents in batches of one row alone. The host waits for the answer, as it does there.

    Args:
        implementation: of attention, as transformers names it.
        position_ids: [B, S].
        mask: the attention mask that layers are given.
        cache: of keys and values.

    Raises:
        ValueError: positions restart inside a row of several.
    """
    if not (implementation or "").startswith("flash") or mask is not None or cache is not None:
        return
    if position_ids.shape[0] > 1 and bool((position_ids.diff(dim=-1) != 1).any()):
        raise ValueError(
            f"position_ids restart inside a row, and {implementation} tells documents apart in a batch of one row only; "
            "put all documents into one row, or use sdpa"
        )
