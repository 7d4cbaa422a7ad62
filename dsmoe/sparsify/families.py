"""Families of policies: for a site, a policy for each of a fine grid of mean active experts.

| family               | knob of a site                     | allocated over sites   |
|----------------------|------------------------------------|------------------------|
| per_layer_k          | k                                  | yes                    |
| per_layer_threshold  | one threshold                      | yes                    |
| per_expert_threshold | one threshold per expert: each is kept for the same share of calibration tokens | yes |
| top_p                | probability mass                   | yes                    |
| uniform_k            | k, the same in all MLP layers; attention experts are all kept, as in the paper  | no  |
| global_threshold     | one threshold for all sites        | no                     |
| global_top_p         | one mass for all sites             | no                     |

Shapes: T calibration tokens, N experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.config.routing import Policy
from dsmoe.errors import UserError
from dsmoe.sparsify.measure import LOWEST
from dsmoe.sparsify.sites import Site

ALLOCATED = ("per_layer_threshold", "per_layer_k", "per_expert_threshold", "top_p")
GLOBAL = ("uniform_k", "global_threshold", "global_top_p")
DEFAULT = "per_layer_threshold"
SCORES = ("gate", "gate_norm")
COARSE = ("uniform_k", "per_layer_k")  # the shares of whole Ks lie far apart
LEVEL_RATIO = 1.04  # of the mean counts of neighbouring levels
MET = 0.01  # a share of active experts farther off than this is not what was asked for
STEPS = 24  # of the bisection for a knob
EXACT = 1e-4  # share of active experts at which it stops


@dataclass
class Level:
    """A policy of one site and the mean active experts that it gives on calibration text under the reference."""

    policy: Policy
    count: float


def levels(site: Site, family: str) -> list[Level]:
    """Levels by rising count; the last one is the reference's own policy.

    Args:
        site: with its probabilities.
        family: one of `ALLOCATED`.
    """
    top = site.reference_count
    if family == "per_layer_k":
        counts = [float(k) for k in range(1, math.ceil(top))]
    else:
        steps = max(1, math.ceil(math.log(top) / math.log(LEVEL_RATIO))) if top > 1 else 0
        counts = [top ** (step / steps) for step in range(steps)]
    found: list[Level] = []
    for policy in _policies(site, family, counts):
        level = Level(policy, site.count(policy))
        if level.count < top and (not found or level.count > found[-1].count):
            found.append(level)
    return [*found, Level(site.reference, top)]


def check_family(family: str, has_mlp_experts: bool) -> None:
    """Refuse a family that has nothing to set; raises UserError."""
    if family == "uniform_k" and not has_mlp_experts:
        raise UserError(
            "family uniform_k sets the K of MLP experts, and the model has none; take per_layer_k for attention experts"
        )


def global_policy(sites: Sequence[Site], family: str, knob: float) -> list[Policy]:
    """The policy of every site under a one-knob family, with the score weights of the sites that have some.

    Args:
        sites: in order.
        family: one of `GLOBAL`.
        knob: K, the threshold on N * p (times the expert's weight), or the mass.
    """
    policies: list[Policy] = []
    for site in sites:
        weights = _weights(site)
        most = site.num_experts if site.kept_experts is None else len(site.kept_experts)
        if family == "uniform_k":
            k = min(round(knob), most)
            policies.append({"policy": "top_k", "k": k, **weights} if site.part == "mlp" else site.reference)
        elif family == "global_threshold":
            policies.append({"policy": "threshold", "threshold": min(knob, _highest(site)), **weights})
        else:
            policies.append({"policy": "top_p", "top_p": knob, **weights})
    return policies


def score_of(policies: Mapping[str, Sequence[Policy]]) -> str | None:
    """What the policies rank experts by, one of `SCORES`; None where they keep all.

    Args:
        policies: {part: one per layer}.
    """
    ranking = [one for per_layer in policies.values() for one in per_layer if one["policy"] != "dense"]
    if not ranking:
        return None
    return "gate_norm" if any("score_weights" in one for one in ranking) else "gate"


def knob_for(sites: Sequence[Site], family: str, share: float) -> float:
    """The knob of a one-knob family that gives a share of active experts, weighted by cost, under the reference.

    For "uniform_k" the largest K within the share, at least 1.
    """
    total = sum(site.num_experts * site.cost for site in sites)

    def share_of(knob: float) -> float:
        policies = global_policy(sites, family, knob)
        return sum(site.count(policy) * site.cost for site, policy in zip(sites, policies)) / total

    if family == "uniform_k":
        most = max(site.num_experts for site in sites)
        return max((k for k in range(1, most + 1) if share_of(k) <= share + 1e-6), default=1)
    if family == "global_threshold":
        # a router that is sure of itself gives most experts next to nothing
        low, high = LOWEST * math.log(2), math.log(max(map(_highest, sites)))
    else:
        low, high = -12.0, 0.0
    middle = low
    for _ in range(STEPS):
        middle = (low + high) / 2
        reached = share_of(math.exp(middle))
        if abs(reached - share) < EXACT:
            break
        # a higher threshold keeps fewer, a higher mass more
        fewer = (reached < share) == (family == "global_threshold")
        low, high = (low, middle) if fewer else (middle, high)
    knob = math.exp(middle)
    return rounded(knob) if family == "global_threshold" else round(knob, 7)


def _weights(site: Site) -> Policy:
    """The policy's field of them, if any."""
    return {} if site.weights is None else {"score_weights": site.weights}


def _highest(site: Site) -> float:
    """The highest threshold that a policy of the site may have: N, times the largest weight."""
    return site.num_experts * max(site.weights or [1.0])


def _policies(site: Site, family: str, counts: Sequence[float]) -> list[Policy]:
    weights = _weights(site)
    if family == "per_layer_k":
        return [{"policy": "top_k", "k": int(count), **weights} for count in counts]
    scores_TN = _scores(site)
    if family == "per_layer_threshold":
        return [
            {"policy": "threshold", "threshold": value, **weights}
            for value in _thresholds(scores_TN, _highest(site), counts)
        ]
    if family == "top_p":
        return [{"policy": "top_p", "top_p": mass, **weights} for mass in _masses(scores_TN, counts)]
    if family == "per_expert_threshold":
        return [
            {"policy": "threshold", "threshold": values, **weights}
            for values in _expert_thresholds(site, scores_TN, counts)
        ]
    raise UserError(f"unknown family {family!r}; known are {', '.join((*ALLOCATED, *GLOBAL))}")


def _scores(site: Site) -> Tensor:
    """[T, N] N * p * w, zero for removed experts."""
    scores_TN = site.probs_TN * site.num_experts
    if site.weights is not None:
        scores_TN = scores_TN * torch.tensor(site.weights, dtype=scores_TN.dtype, device=scores_TN.device)
    if site.kept_experts is not None:
        mask = torch.zeros(site.num_experts, dtype=torch.bool, device=scores_TN.device)
        mask[site.kept_experts] = True
        scores_TN = scores_TN * mask
    return scores_TN


def _thresholds(scores_TN: Tensor, highest: float, counts: Sequence[float]) -> list[float]:
    """The best expert is always kept; so a mean count c keeps the T * (c - 1) largest of all other scores."""
    others = scores_TN.sort(dim=-1, descending=True).values[:, 1:].flatten().sort(descending=True).values
    found = []
    for count in counts:
        place = min(len(others) - 1, round(len(scores_TN) * (count - 1)))
        above = float(others[place - 1]) if place else highest
        found.append(min(rounded((above + float(others[place])) / 2), highest))
    return found


def _masses(scores_TN: Tensor, counts: Sequence[float]) -> list[float]:
    """An expert is kept while those before it don't reach the mass; so count c takes the T * (c - 1) smallest sums."""
    shares = scores_TN / scores_TN.sum(-1, keepdim=True)
    ordered = shares.sort(dim=-1, descending=True).values
    before = (ordered.cumsum(-1) - ordered)[:, 1:].flatten().sort().values
    places = [min(len(before) - 1, round(len(scores_TN) * (count - 1))) for count in counts]
    return [min(1.0, max(0.0, round(float(before[place]), 7))) for place in places]


def _expert_thresholds(site: Site, scores_TN: Tensor, counts: Sequence[float]) -> list[list[float]]:
    """Quantiles: each expert is kept for the same share of tokens; the share by bisection, as the best one stays."""
    ordered = scores_TN.sort(dim=0, descending=True).values
    best = torch.zeros_like(scores_TN, dtype=torch.bool).scatter(-1, scores_TN.argmax(-1, keepdim=True), True)
    tokens = len(scores_TN)

    def cut(share: float) -> Tensor:
        return ordered[min(tokens - 1, int(share * tokens))]

    found = []
    low_share = 0.0
    for count in counts:
        low, high = low_share, 1.0
        for _ in range(14):
            middle = (low + high) / 2
            mean = float(((scores_TN > cut(middle)) | best).sum(-1).double().mean())
            low, high = (middle, high) if mean < count else (low, middle)
        low_share = low
        found.append([min(rounded(value), _highest(site)) for value in cut(high).tolist()])
    return found


def rounded(value: float) -> float:
    """Six significant digits: what a config.json should hold."""
    return float(f"{value:.6g}")
