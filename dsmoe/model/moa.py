"""Mixture of attention heads (MoA): experts are groups of query heads with shared keys and values.

Each attention expert has its own W_q and W_o and `num_key_value_heads` query heads; head j of every expert reads
KV head j. Keys and values are computed and cached for every token, whatever the policy, so that later tokens can
attend to them. Source: arXiv 2404.05567, section 3; arXiv 2210.05144 (MoA).

Shapes: B batch, S positions, T = B * S, D hidden size, A experts that are stored, J heads of one expert, hd head_dim,
W = J * hd.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache

from dsmoe.config import DSMoEConfig
from dsmoe.model.attention import KeyValueAttention
from dsmoe.model.autocast import compute_dtype
from dsmoe.model.gated_projection import gated_projection
from dsmoe.model.grouped import grouped_linear
from dsmoe.model.norm import RMSNorm
from dsmoe.model.pairs import kept_pairs
from dsmoe.model.rotary import rotate
from dsmoe.model.router import Router
from dsmoe.model.routing import route


class MixtureOfHeads(KeyValueAttention):
    """Attention whose query heads are gated experts.

    Only the experts that the config keeps have weights; the router scores all. In memory `experts_q_proj` and
    `experts_o_proj` are [A, W, D]; on disk `experts_o_proj` is [A, D, W] (see `dsmoe.model.weights`).

    Attributes:
        runs_all_heads: compute all heads whatever the policy, with gates of zero on dropped ones: the same result in
            shapes that don't depend on the tokens.
    """

    q_norm: RMSNorm
    stacked = ("experts_q_proj", "experts_o_proj")

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.runs_all_heads = False
        self.heads_per_expert = config.num_key_value_heads
        num_kept = config.num_kept_experts("attention", layer_idx)
        shape = (num_kept, self.heads_per_expert * self.head_dim, config.hidden_size)
        self.experts_q_proj = nn.Parameter(torch.empty(shape))
        self.experts_o_proj = nn.Parameter(torch.empty(shape))
        self.router = Router(
            config.hidden_size,
            config.num_attention_experts,
            config.router_hidden_size,
            "attention_router",
            layer_idx,
        )

    def forward(
        self,
        x_BSD: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Attention output [B, S, D], weights where available, and router logits [B, S, all experts]."""
        logits = self.router(x_BSD)
        probs = logits.softmax(-1).flatten(0, 1)
        gates_TA, mask_TA = route(probs, self.config, "attention", self.layer_idx)
        call = _Call(
            *self.keys_and_values(x_BSD, *position_embeddings, past_key_values),
            position_embeddings,
            attention_mask,
            kwargs,
        )
        if mask_TA is None or self.runs_all_heads:
            out, weights = self._all_heads(x_BSD, gates_TA, call)
        elif gates_TA.shape[0] == 1:
            out, weights = self._kept_heads(x_BSD, gates_TA, mask_TA[0].nonzero()[:, 0], call)
        else:
            out, weights = self._kept_pairs(x_BSD, gates_TA, mask_TA, call)
        return out, weights, logits

    def _attend_by_expert(self, q_BSAW: Tensor, call: "_Call") -> tuple[Tensor, Tensor | None]:
        """Attention outputs [B, S, A', W] of queries [B, S, A', W]; the A' heads of KV head j stand together."""
        batch, length, experts, _ = q_BSAW.shape
        heads = q_BSAW.unflatten(-1, (self.heads_per_expert, self.head_dim))
        if self.config.qk_norm == "per_head":
            heads = self.q_norm(heads)
        query = heads.permute(0, 3, 2, 1, 4).reshape(batch, -1, length, self.head_dim)
        module: Any = self
        if experts != self.num_key_value_groups:
            # attention implementations read the number of query heads per KV head off the module
            module = SimpleNamespace(
                num_key_value_groups=experts,
                is_causal=True,
                training=self.training,
                config=self.config,
                layer_idx=self.layer_idx,
            )
        query = rotate(query, *call.positions)
        out, weights = self.attend(query, call.key, call.value, call.mask, module=module, **call.kwargs)
        out = out.unflatten(2, (self.heads_per_expert, experts)).transpose(2, 3)
        return out.flatten(3), weights

    def _all_heads(self, x_BSD: Tensor, gates_TA: Tensor, call: "_Call") -> tuple[Tensor, Tensor | None]:
        """Dense mode: one wide projection in, one wide projection out, gates on the heads in between."""
        q_BSAW = (x_BSD @ self.experts_q_proj.flatten(0, 1).T).unflatten(-1, (gates_TA.shape[-1], -1))
        out, weights = self._attend_by_expert(q_BSAW, call)
        y_TD = gated_projection(out.flatten(0, 1), gates_TA, self.experts_o_proj)
        return y_TD.view(x_BSD.shape), weights

    def _kept_heads(
        self, x_BSD: Tensor, gates_TA: Tensor, kept: Tensor, call: "_Call"
    ) -> tuple[Tensor, Tensor | None]:
        """One token: only the kept experts' heads form the query."""
        q_BSAW = (x_BSD @ self.experts_q_proj[kept].flatten(0, 1).T).unflatten(-1, (kept.numel(), -1))
        out, weights = self._attend_by_expert(q_BSAW, call)
        gated = out * gates_TA[:, kept].to(out.dtype).view(1, 1, -1, 1)
        return gated.flatten(2) @ self.experts_o_proj[kept].flatten(0, 1), weights

    @torch.compiler.disable
    def _kept_pairs(
        self, x_BSD: Tensor, gates_TA: Tensor, mask_TA: Tensor, call: "_Call"
    ) -> tuple[Tensor, Tensor | None]:
        """Many tokens: projections of kept pairs only; the attention core still runs over all heads.

        Tokens of one sequence keep different heads, and attention kernels take a rectangle of heads and positions. Not
        for torch.compile, which would make a graph for each number of pairs.
        """
        token_P, expert_P, counts_A = kept_pairs(mask_TA)
        x_TD = x_BSD.flatten(0, 1)
        # rotary embeddings leave keys in float32 under autocast
        q_PW = grouped_linear(x_TD[token_P].to(compute_dtype(x_TD)), self.experts_q_proj, counts_A, "out_in")
        q_TAW = q_PW.new_zeros(*mask_TA.shape, q_PW.shape[-1])
        q_TAW = q_TAW.index_put((token_P, expert_P), q_PW)
        out, weights = self._attend_by_expert(q_TAW.unflatten(0, x_BSD.shape[:2]), call)
        out_PW = out.flatten(0, 1)[token_P, expert_P] * gates_TA[token_P, expert_P, None].to(out.dtype)
        y_PD = grouped_linear(out_PW, self.experts_o_proj, counts_A, "in_out")
        total = torch.zeros_like(x_TD, dtype=torch.promote_types(y_PD.dtype, torch.float32))
        return total.index_add(0, token_P, y_PD.to(total.dtype)).to(y_PD.dtype).view_as(x_BSD), weights


class _Call(NamedTuple):
    """What an attention call takes besides the queries."""

    key: Tensor
    value: Tensor
    positions: tuple[Tensor, Tensor]
    mask: Tensor | None
    kwargs: dict[str, Any]
