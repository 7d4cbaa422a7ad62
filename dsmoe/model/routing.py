"""From router logits to gates and kept experts, as pure functions.

Shapes: T tokens, N experts. Source: arXiv 2404.05567, section 3; policies in `dsmoe.config.routing`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def keep_experts(probs_TN: Tensor, policy: Mapping[str, Any]) -> Tensor:
    """Which experts each token keeps.

    Args:
        probs_TN: [T, N] softmax over all N experts.
        policy: a checked routing policy.

    Returns:
        [T, N] bool; every row has at least one True (its best expert).
    """
    num_experts = probs_TN.shape[-1]
    name = policy["policy"]
    if name == "dense":
        return torch.ones_like(probs_TN, dtype=torch.bool)
    if name == "top_k":
        return _top_k(probs_TN, policy["k"])
    if name == "top_p":
        sorted_probs, order = probs_TN.sort(dim=-1, descending=True, stable=True)
        # an expert is needed while the ones before it don't reach top_p; the first always is
        before = sorted_probs.cumsum(-1) - sorted_probs
        needed = before < policy["top_p"]
        needed[..., 0] = True
        return torch.zeros_like(needed).scatter(-1, order, needed)
    kept = _above_threshold(probs_TN, policy["threshold"])
    if name == "threshold":
        return kept
    k = policy["k"]
    if k is None:
        k = max(1, min(num_experts, round(kept.sum(-1).float().mean().item()))) if kept.numel() else 1
    return _top_k(probs_TN, k)


def _top_k(probs_TN: Tensor, k: int) -> Tensor:
    indices = probs_TN.topk(k, dim=-1).indices
    return torch.zeros_like(probs_TN, dtype=torch.bool).scatter(-1, indices, True)


def _above_threshold(probs_TN: Tensor, threshold: float) -> Tensor:
    kept = probs_TN * probs_TN.shape[-1] > threshold
    best = probs_TN.argmax(dim=-1, keepdim=True)
    return kept.scatter(-1, best, True)


def gate_values(probs_TN: Tensor, expert_mask_TN: Tensor | None, normalization: str, scale: float) -> Tensor:
    """The combining weights of the experts.

    Args:
        probs_TN: [T, N] softmax over all N experts.
        expert_mask_TN: [T, N] bool of the kept experts, or None for all.
        normalization: "softmax": scale * p; "l2": scale * p / ||p|| over all N; "renormalized":
            scale * p / (sum of p over the kept experts).
        scale: see `DSMoEConfig.mlp_gate_scale`.

    Returns:
        [T, N]; zero for dropped experts.
    """
    kept_TN = probs_TN if expert_mask_TN is None else probs_TN * expert_mask_TN
    if normalization == "l2":
        return kept_TN * (scale / torch.linalg.vector_norm(probs_TN, dim=-1, keepdim=True))
    if normalization == "renormalized":
        return kept_TN * (scale / kept_TN.sum(-1, keepdim=True))
    return kept_TN * scale
