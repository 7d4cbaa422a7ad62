"""From router probabilities to gates and kept experts, as pure functions.

Shapes: T tokens, N experts, M experts that the layer stores (N where none were removed). Source: arXiv 2404.05567,
section 3; policies in `dsmoe.config.routing`.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import is_dense


def route(probs_TN: Tensor, config: DSMoEConfig, part: str, layer_idx: int) -> tuple[Tensor, Tensor | None]:
    """Gates and kept experts of a layer, as its policy in the config says.

    Args:
        probs_TN: [T, N] softmax over all N experts.
        config: holds the policy, the stored experts and the gates' normalisation.
        part: "mlp" or "attention".
        layer_idx: the layer.

    Returns:
        gates [T, M] and mask [T, M] bool (None where every token keeps all) of the stored experts.
    """
    kept_experts, policy = config.kept_experts(part, layer_idx), config.routing(part, layer_idx)
    expert_mask_TM = None
    if not is_dense(policy, probs_TN.shape[-1] if kept_experts is None else len(kept_experts)):
        expert_mask_TM = choose_experts(probs_TN, policy, kept_experts)
    scale, constant = config.attention_gate_scale, 0.0
    if part == "mlp":
        scale, constant = config.mlp_gate_scale, config.gate_constant
    gates_TM = gate_values(probs_TN, expert_mask_TM, config.gate_normalization, scale, kept_experts, constant)
    return gates_TM, expert_mask_TM


def keep_experts(
    probs_TN: Tensor, policy: Mapping[str, Any], kept_experts: Sequence[int] | None = None
) -> Tensor:
    """Which experts each token keeps.

    Args:
        probs_TN: [T, N] softmax over all N experts.
        policy: a checked routing policy.
        kept_experts: the experts that are stored, ascending; None: all.

    Returns:
        [T, N] bool; every row has at least one True (its best stored expert), and removed experts are False.
    """
    chosen_TM = choose_experts(probs_TN, policy, kept_experts)
    if kept_experts is None:
        return chosen_TM
    columns_M = _constant(kept_experts, torch.int64, probs_TN)
    return torch.zeros_like(probs_TN, dtype=torch.bool).index_copy(-1, columns_M, chosen_TM)


def choose_experts(
    probs_TN: Tensor, policy: Mapping[str, Any], kept_experts: Sequence[int] | None = None
) -> Tensor:
    """`keep_experts` cut to the columns of the stored experts, [T, M] bool."""
    name, num_experts = policy["policy"], probs_TN.shape[-1]
    scores_TM = _scores(probs_TN, policy, kept_experts)
    if name == "dense":
        return torch.ones_like(scores_TM, dtype=torch.bool)
    if name == "top_k":
        return _top_k(scores_TM, policy["k"])
    if name == "top_p":
        return _top_p(scores_TM, policy["top_p"])
    k = policy.get("k")
    if name == "threshold_top_k" and k is not None:
        return _top_k(scores_TM, k)
    kept_TM = _above_threshold(scores_TM * num_experts, policy["threshold"], kept_experts)
    if name == "threshold":
        return kept_TM
    k = max(1, round(kept_TM.sum(-1).float().mean().item())) if kept_TM.numel() else 1
    return _top_k(scores_TM, k)


def _scores(probs_TN: Tensor, policy: Mapping[str, Any], kept_experts: Sequence[int] | None) -> Tensor:
    """What the choice is made on: s = p * w, for top_p its share of the sum over all N; stored experts alone."""
    scores_TN = probs_TN.detach()
    weights = policy.get("score_weights")
    if weights is not None:
        scores_TN = scores_TN * _constant(weights, probs_TN.dtype, probs_TN)
        if policy["policy"] == "top_p":
            scores_TN = scores_TN / scores_TN.sum(-1, keepdim=True)
    return _stored(scores_TN, kept_experts)


def _stored(values_TN: Tensor, kept_experts: Sequence[int] | None) -> Tensor:
    """The columns of the stored experts."""
    if kept_experts is None:
        return values_TN
    return values_TN.index_select(-1, _constant(kept_experts, torch.int64, values_TN))


def _top_k(scores_TM: Tensor, k: int) -> Tensor:
    indices_TK = scores_TM.topk(k, dim=-1).indices
    if torch.compiler.is_compiling():
        # inductor (torch 2.13, CPU) reads a scattered mask before it is written where it fuses the gates with it
        return _is_index(indices_TK[..., None], scores_TM).any(-2)
    return torch.zeros_like(scores_TM, dtype=torch.bool).scatter(-1, indices_TK, True)


def _is_index(indices: Tensor, scores_TM: Tensor) -> Tensor:
    """[..., M] bool: where the last dimension of the scores has these indices [..., 1]."""
    return indices == torch.arange(scores_TM.shape[-1], device=scores_TM.device)


def _top_p(shares_TM: Tensor, top_p: float) -> Tensor:
    sorted_shares, order = shares_TM.sort(dim=-1, descending=True, stable=True)
    # an expert is needed while the ones before it don't reach top_p; the first always is
    before = sorted_shares.cumsum(-1) - sorted_shares
    needed = before < top_p
    needed[..., 0] = True
    if torch.compiler.is_compiling():  # see `_top_k`
        return needed.gather(-1, order.argsort(-1))
    return torch.zeros_like(needed).scatter(-1, order, needed)


def _above_threshold(
    scaled_TM: Tensor, threshold: float | Sequence[float], kept_experts: Sequence[int] | None
) -> Tensor:
    limit: float | Tensor
    if isinstance(threshold, Sequence):
        limit = _stored(_constant(threshold, scaled_TM.dtype, scaled_TM), kept_experts)
    else:
        limit = threshold
    return (scaled_TM > limit) | _is_index(scaled_TM.argmax(dim=-1, keepdim=True), scaled_TM)


def gate_values(
    probs_TN: Tensor,
    expert_mask_TM: Tensor | None,
    normalization: str,
    scale: float,
    kept_experts: Sequence[int] | None = None,
    constant: float = 0.0,
) -> Tensor:
    """The combining weights of the experts.

    Args:
        probs_TN: [T, N] softmax over all N experts.
        expert_mask_TM: [T, M] bool of the experts that each token keeps, or None for all that are stored.
        normalization: "softmax": scale * p; "l2": scale * p / ||p|| over all N; "renormalized":
            scale * p / (sum of p over the kept experts).
        scale: see `DSMoEConfig.mlp_gate_scale`.
        kept_experts: the experts that are stored, ascending; None: all.
        constant: c: a gate g becomes c + (1 - c) * g (see `DSMoEConfig.gate_constant`).

    Returns:
        [T, M]; zero for dropped experts.
    """
    gates_TM = _changing_part(probs_TN, expert_mask_TM, normalization, scale, kept_experts)
    if not constant:
        return gates_TM
    gates_TM = constant + (1 - constant) * gates_TM
    return gates_TM if expert_mask_TM is None else gates_TM * expert_mask_TM


def _changing_part(
    probs_TN: Tensor,
    expert_mask_TM: Tensor | None,
    normalization: str,
    scale: float,
    kept_experts: Sequence[int] | None,
) -> Tensor:
    kept_TM = _stored(probs_TN, kept_experts)
    if expert_mask_TM is not None:
        kept_TM = kept_TM * expert_mask_TM
    if normalization == "l2":
        return kept_TM * (scale / torch.linalg.vector_norm(probs_TN, dim=-1, keepdim=True))
    if normalization == "renormalized":
        return kept_TM * (scale / kept_TM.sum(-1, keepdim=True))
    return kept_TM * scale


def _constant(values: Sequence[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Numbers of the config as a tensor on the device of `like`; made once, as a copy to a GPU would wait for it."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # tracing, or fake tensors
        return torch.tensor(values, dtype=dtype, device=like.device)
    return _cached(tuple(values), dtype, like.device)


@lru_cache(maxsize=1024)
def _cached(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    # a tensor that inference mode makes could not be saved for a later backward pass
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
