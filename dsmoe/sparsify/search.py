"""From one dense model to a frontier of sparse ones: allocations on calibration text, corrected by measuring."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from dsmoe.errors import UserError
from dsmoe.sparsify.allocation import Allocation
from dsmoe.sparsify.compare import Comparer, Comparison, Policies
from dsmoe.sparsify.families import ALLOCATED, COARSE, MET, check_family, global_policy, knob_for
from dsmoe.sparsify.sites import Site

SCAN = 7
TOLERANCE = 0.003  # of a share that is asked for
RIVALS = ("uniform_k", "global_threshold")
ROUNDS = 3  # of corrections


@dataclass
class Candidate:
    """A sparse model that was measured.

    Attributes:
        family: of its policies.
        share: measured share of active experts, weighted by their cost.
        comparison: with the reference.
        policies: {"mlp": one per layer, "attention": one per layer}.
        whole: measured on all calibration tokens (False: on the part that curves are measured on).
    """

    family: str
    share: float
    comparison: Comparison
    policies: Policies
    whole: bool

    def as_dict(self) -> dict[str, Any]:
        """Numbers, JSON-able, without the policies."""
        active = {part: self.comparison.active.mean(part) for part in self.comparison.active.counts}
        return {
            "family": self.family,
            "active_share": self.share,
            "whole_text": self.whole,
            **self.comparison.as_dict(),
            "mean_active": {part: [round(mean, 4) for mean in means] for part, means in active.items()},
        }


class Frontier:
    """Sparse models of one checkpoint for every budget; made by `calibrate`.

    Args:
        comparer: over all calibration tokens.
        part: over the tokens that curves are measured on.
        allocation: its curves are measured at the first need.
        family: its name.
        show: progress bars.
    """

    def __init__(
        self, comparer: Comparer, part: Comparer, allocation: Allocation, family: str, show: bool
    ) -> None:
        self.comparer, self.part, self.allocation, self.family = comparer, part, allocation, family
        self.visited: list[Candidate] = []
        self._show = show
        self._known: dict[str, Candidate] = {}

    @property
    def sites(self) -> list[Site]:
        """All sites."""
        return [curve.site for curve in self.allocation.curves]

    @property
    def reference_share(self) -> float:
        """Share of active experts of the reference."""
        return sum(site.reference_count * site.cost for site in self.sites) / self.allocation.total

    def at_share(self, share: float, family: str | None = None, at_most: float | None = None) -> Candidate:
        """The model with this share of active experts (of all experts' parameters, or FLOPs).

        Args:
            share: of the site costs that `calibrate` was given.
            family: one of `GLOBAL`, or the family of the frontier: that one alone, whatever is better (uniform_k: the
                largest K within the share); None: the best of the frontier's own family, uniform K and a global
                threshold.
            at_most: a share that must not be exceeded, and that any smaller one is within; None: what is 0.01 above or
                below the share counts as met (of a family of whole Ks: whatever is below).

        Raises:
            UserError: fewer than one expert each, or more than the reference has; nothing that counts as met was found;
                or a family that the model has no experts for.
        """
        own = self._own(family)
        least, most = self.allocation.least, self.reference_share
        if not least - TOLERANCE <= share <= most + TOLERANCE:
            raise UserError(
                f"an active share of {share:g} can't be met: one expert per layer and token is {least:.4g}, "
                f"and the checkpoint as it is has {most:.4g}"
            )
        self._correct(share, own)
        ceiling = min(share + MET, math.inf if at_most is None else at_most) + 1e-9
        families = [own, *(rival for rival in self._rivals if family is None and rival != own)]
        found = [self._hit(one, share, ceiling) for one in families]
        allowed = [one for one in found if one.share <= ceiling]
        near = [one for one in allowed if one.share >= share - MET]
        if not near and (own in COARSE or at_most is not None):
            near = allowed
        if not near:
            nearest = min(found, key=lambda one: abs(one.share - share))
            raise UserError(
                f"an active share of {share:.4g} can't be met: the nearest found with family {' or '.join(families)} is "
                f"{nearest.share:.4g}; ask for a share near it, or take another family"
            )
        return min(near, key=lambda one: one.comparison.damage)

    def within(self, bound: float, family: str | None = None) -> Candidate:
        """The sparsest model whose loss increase plus one standard error is within a bound.

        Args:
            bound: nats per token.
            family: as in `at_share`.

        Raises:
            UserError: none was found (for a bound below 0: the reference itself meets 0), text of a single document, or a
                family that the model has no experts for.
        """
        own = self._own(family)
        if len(np.unique(self.comparer.cluster_ids())) < 2:
            raise UserError(
                f"a bound on the loss increase ({bound:g} nats) needs a standard error, and the calibration text is a "
                "single document; give several, or a longer one (of more than four windows of --sequence-length)"
            )
        start = self._scan(own, bound)
        self._correct(start, own)
        best = self._bisect(own, bound, start)
        if best is not None and own in ALLOCATED and not self.allocation.corrected_near(best.share):
            self._correct(best.share, own)
            best = self._bisect(own, bound, best.share)
        if family is None and best is not None:
            for rival in self._rivals:
                found = self._hit(rival, best.share, best.share + MET)
                # as good with no more experts: its own sparsest model may be sparser still
                if found.comparison.upper <= bound and found.share < best.share * 1.005:
                    self._bisect(rival, bound, found.share)
        met = [
            one
            for one in self.visited
            if one.whole and one.comparison.upper <= bound and family in (None, one.family)
        ]
        if met:
            return min(met, key=lambda one: one.share)
        if bound >= 0:
            return self._measure("reference", self.allocation.reference, True)
        lowest = min((one for one in self.visited if one.whole), key=lambda one: one.comparison.upper)
        raise UserError(
            f"a loss increase of {bound:g} nats can't be met: the best found is "
            f"{lowest.comparison.loss_increase:.5f} with standard error {lowest.comparison.standard_error:.5f}, "
            f"at {lowest.share:.1%} active"
        )

    def describe(self) -> dict[str, Any]:
        """Everything that was measured, JSON-able."""
        return {"family": self.family, **self.allocation.describe(),
                "visited": [one.as_dict() for one in self.visited]}  # fmt: skip

    @property
    def _has_mlp_experts(self) -> bool:
        return any(site.part == "mlp" for site in self.sites)

    @property
    def _rivals(self) -> list[str]:
        return [one for one in RIVALS if one != "uniform_k" or self._has_mlp_experts]

    def _own(self, family: str | None) -> str:
        """The family that is searched first, after checking that the model has experts for it."""
        own = family or self.family
        check_family(own, self._has_mlp_experts)
        return own

    def _build(self, family: str, share: float) -> Policies:
        """Policies of a family at an expected share."""
        if family in ALLOCATED:
            if not self.allocation.measured:
                self.allocation.measure(self.part, self._show)
            return self.allocation.policies(self.allocation.levels(share))
        return self._placed(global_policy(self.sites, family, knob_for(self.sites, family, share)))

    def _placed(self, policies: Sequence[Any]) -> Policies:
        found = {part: list(per_layer) for part, per_layer in self.allocation.reference.items()}
        for site, policy in zip(self.sites, policies):
            found[site.part][site.layer] = policy
        return found

    def _measure(self, family: str, policies: Policies, whole: bool) -> Candidate:
        key = json.dumps([whole, policies])
        if key not in self._known:
            comparison = (self.comparer if whole else self.part)(
                policies, progress="measuring" if self._show else None
            )
            share = self.allocation.share(comparison.active)
            self._known[key] = Candidate(family, share, comparison, policies, whole)
            self.visited.append(self._known[key])
        return self._known[key]

    def _hit(self, family: str, share: float, ceiling: float) -> Candidate:
        """The family's model with a measured share: routing shifts when earlier layers become sparse.

        Where the share isn't hit: the nearest, rather below the ceiling than above.
        """
        if family == "uniform_k":
            return self._measure(family, self._build(family, share + TOLERANCE), True)
        asked, low, high = share, 0.0, math.inf  # what was asked where too few, and too many came out
        found: list[Candidate] = []
        whole = False
        for attempt in range(7):
            # the first tries on a part of the text, whose shares are a little different
            if not whole and (attempt > 2 or (found and abs(found[-1].share - share) < TOLERANCE)):
                whole, low, high = True, 0.0, math.inf
            found.append(self._measure(family, self._build(family, asked), whole))
            if whole and abs(found[-1].share - share) < TOLERANCE and found[-1].share <= ceiling:
                return found[-1]
            low, high = (asked, high) if found[-1].share < share else (low, asked)
            asked = min(1.0, max(self.allocation.least, asked * share / found[-1].share))
            if 0 < low < high < math.inf and not low < asked < high:
                asked = math.sqrt(low * high)
        best = min(found, key=lambda one: (one.share > ceiling, abs(one.share - share)))
        return self._measure(family, best.policies, True)

    def _correct(self, share: float, family: str) -> None:
        if family not in ALLOCATED or self.allocation.corrected_near(share):
            return
        self._build(family, share)
        runs = 2 * ROUNDS * len(self.sites) * len(self.part.batches)
        with tqdm(total=runs, desc=f"correcting near {share:.0%}", unit="run", leave=False,
                  disable=not self._show) as bar:  # fmt: skip
            self.allocation.correct(share, self.part, ROUNDS, bar.update)

    def _scan(self, family: str, bound: float) -> float:
        """The smallest share, by measuring a part of the text coarsely, that seems to meet the bound."""
        low, high = math.log(self.allocation.least * 1.001), math.log(self.reference_share)
        sparser: Candidate | None = None
        for step in range(SCAN):
            share = math.exp(low + (high - low) * step / SCAN)
            found = self._measure(family, self._build(family, share), False)
            if found.comparison.damage <= bound:
                if sparser is None:
                    return share
                return _crossing(
                    share, found.comparison.damage, sparser.share, sparser.comparison.damage, bound
                )
            sparser = found
        return self.reference_share * 0.95

    def _bisect(self, family: str, bound: float, start: float) -> Candidate | None:
        """The sparsest model of a family whose upper bound is within the bound, on all tokens."""
        good: tuple[float, Candidate] | None = None
        bad: tuple[float, Candidate] | None = None
        asked, low, high = start, self.allocation.least, self.reference_share * 0.999
        for _ in range(10):
            found = self._measure(family, self._build(family, asked), True)
            if found.comparison.upper <= bound:
                good = asked, found
            else:
                bad = asked, found
            if good is None:
                if asked >= high:
                    return None
                asked = min(high, asked * 1.2)
            elif bad is None:
                if asked <= low * 1.001:
                    break
                asked = max(low, asked / 1.15)
            elif good[0] / bad[0] < 1.02:
                break
            else:
                asked = _crossing(good[0], good[1].comparison.upper, bad[0], bad[1].comparison.upper, bound)
        return None if good is None else good[1]


def _crossing(share: float, value: float, sparser: float, worse: float, bound: float) -> float:
    """Where the loss meets the bound, between a share that is within it and a sparser one that isn't."""
    part = (bound - value) / max(worse - value, 1e-12)
    part = min(0.85, max(0.15, part))
    return math.exp(math.log(share) + part * (math.log(sparser) - math.log(share)))
