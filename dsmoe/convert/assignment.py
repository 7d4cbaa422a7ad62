"""Which hidden units of a dense MLP make up which expert.

Shapes: F hidden units of the dense MLP, N experts, C = F / N units of one expert, D hidden size.
"""

import torch
from torch import Tensor

ASSIGNMENTS = ("contiguous", "cluster")
_ROUNDS = 20


def assign_units(rows_FD: Tensor, num_experts: int, assignment: str, seed: int = 0) -> Tensor:
    """Deal the hidden units out to experts of one size.

    Args:
        rows_FD: [F, D] what decides when a unit is active: its gate row (swiglu) or its up row (gelu).
        num_experts: N, a divisor of F.
        assignment: "contiguous": in the order of the dense MLP; "cluster": units with rows of like direction together,
            by k-means on the sphere with clusters of one size (the idea is that of MoEfication, arXiv 2110.01786).
        seed: of the first centres of "cluster".

    Returns:
        [N, C] int64: every unit once, ascending within an expert.
    """
    units = rows_FD.shape[0]
    if assignment == "contiguous" or num_experts == 1:
        return torch.arange(units, device=rows_FD.device).view(num_experts, -1)
    assert assignment == "cluster", assignment
    rows_FD = torch.nn.functional.normalize(rows_FD.float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    centres_ND = rows_FD[torch.randperm(units, generator=generator)[:num_experts].to(rows_FD.device)]
    expert_F = torch.full((units,), -1, device=rows_FD.device)
    for _ in range(_ROUNDS):
        found_F = balanced_choice(rows_FD @ centres_ND.T)
        if torch.equal(found_F, expert_F):
            break
        expert_F = found_F
        sums_ND = torch.zeros_like(centres_ND).index_add(0, expert_F, rows_FD)
        centres_ND = torch.nn.functional.normalize(sums_ND, dim=-1)
    # a stable sort keeps the units of an expert in order
    return expert_F.argsort(stable=True).view(num_experts, -1)


def balanced_choice(similarity_FN: Tensor) -> Tensor:
    """Give each unit an expert, the same number to each: the most similar pair first, and so on down (greedily).

    Units and experts rank each other by the same numbers, so the greedy result is the one stable matching, and deferred
    acceptance (Gale and Shapley 1962) finds it with whole-tensor operations: every unit asks the expert that it likes
    best, experts refuse all but the best F / N, and who was refused asks the next.

    Args:
        similarity_FN: [F, N]; N divides F.

    Returns:
        [F] int64.
    """
    units, num_experts = similarity_FN.shape
    capacity = units // num_experts
    open_FN = similarity_FN.clone()
    index_F = torch.arange(units, device=open_FN.device)
    while True:
        score_F, expert_F = open_FN.max(1)
        # best first within each expert; equal scores in the order of units
        order_F = score_F.argsort(descending=True, stable=True)
        order_F = order_F[expert_F[order_F].argsort(stable=True)]
        first_N = torch.searchsorted(
            expert_F[order_F].contiguous(), torch.arange(num_experts, device=open_FN.device)
        )
        refused = order_F[index_F - first_N[expert_F[order_F]] >= capacity]
        if not refused.numel():
            return expert_F
        open_FN[refused, expert_F[refused]] = -torch.inf
