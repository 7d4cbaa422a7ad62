"""vLLM's fused experts, fed with this model's router, policy and gates.

Shapes: T tokens, D hidden size, N experts, K experts of a token.
"""

from types import MethodType
from typing import Any

from torch import Tensor

from dsmoe.model.mlp import MixtureMLP
from dsmoe.model.routing import route


def route_into_fused(mlp: MixtureMLP) -> None:
    """Let a layer call `experts(x, ids, weights)`, the form of vLLM's; its router and its policy stay."""
    mlp.forward = MethodType(_forward, mlp)  # type: ignore[method-assign]


def _forward(self: Any, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    x_TD = x_BSD.flatten(0, 1)
    logits_TN = self.router(x_TD)
    gates_TN, expert_mask_TN = route(logits_TN.softmax(-1), self.config, "mlp", self.layer_idx)
    ids_TK, weights_TK = chosen(gates_TN, expert_mask_TN, self.config.routing("mlp", self.layer_idx)["k"])
    out_TD = self.experts(x_TD, ids_TK, weights_TK)
    return out_TD.view(x_BSD.shape), logits_TN.view(*x_BSD.shape[:2], -1)


def chosen(gates_TN: Tensor, expert_mask_TN: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Experts and gates of each token.

    Args:
        gates_TN: [T, N] gates, at least 0.
        expert_mask_TN: [T, N] bool with k True in each row; None: all.
        k: experts of a token.

    Returns:
        ids [T, K] int64 and weights [T, K].
    """
    ranked_TN = gates_TN if expert_mask_TN is None else gates_TN.masked_fill(~expert_mask_TN, -1.0)
    weights_TK, ids_TK = ranked_TN.topk(k, dim=-1)
    return ids_TK, weights_TK
