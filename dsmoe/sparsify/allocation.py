"""A family's allocation over the sites: damage curves, corrections around an allocation, and the knapsack over them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from dsmoe.sparsify.allocate import Knapsack
from dsmoe.sparsify.compare import Comparer, Policies
from dsmoe.sparsify.damage import Around, Curve, Point, measure_curves, measure_variants, spread
from dsmoe.sparsify.measure import ActiveExperts
from dsmoe.sparsify.sites import Site

UNITS = 4000  # of the knapsack's budget
STEP = 1.3  # ratio of the mean counts that a correction compares with the present ones
POINTS = 7  # of a curve
NEAR = 0.12  # in the logarithm of a share
REACH = 1.6  # corrected allocations stay within this ratio of the measured one's mean counts
CLIP = 8.0  # a correction multiplies a curve's slope by at most this


@dataclass
class Anchor:
    """What was measured around the allocation of a share.

    Attributes:
        place: logarithm of the share.
        slopes: [sites] measured slope of the loss over that of the site's curve.
        counts: [sites] measured mean active experts over those expected from the reference's routing.
        centre: the best levels that were measured there: slopes hold near them only.
    """

    place: float
    slopes: np.ndarray
    counts: np.ndarray
    centre: list[int] | None = None


class Allocation:
    """Levels of all sites for any share of active experts.

    Damages of sites don't quite add up, and routers choose otherwise behind sparse layers. So near an allocation the
    slope of each curve and each site's mean count are measured, and the curves and costs scaled to them. Corrections
    are remembered with their share, and interpolated between (in the logarithm of the share).

    Args:
        curves: of all sites.
        reference: policies of the reference.
    """

    def __init__(self, curves: Sequence[Curve], reference: Policies) -> None:
        self.curves = list(curves)
        self.reference = reference
        self.total = sum(curve.site.num_experts * curve.site.cost for curve in self.curves)
        self._damages: list[np.ndarray] = []
        # with nearly all experts active there is nothing to correct
        self._anchors = [Anchor(0.0, np.ones(len(self.curves)), np.ones(len(self.curves)))]

    @property
    def least(self) -> float:
        """The smallest share that it can express."""
        return sum(c.levels[0].count * c.site.cost for c in self.curves) / self.total

    @property
    def measured(self) -> bool:
        """Whether the curves are."""
        return bool(self._damages)

    def measure(self, comparer: Comparer, show: bool = False) -> None:
        """Measure the curves; needed before anything below.

        Args:
            comparer: holds the reference.
            show: a progress bar.
        """
        runs = sum(len(spread(curve.levels, POINTS)) for curve in self.curves) * len(comparer.batches)
        with tqdm(total=runs, desc="damage curves", unit="run", disable=not show, leave=False) as bar:
            measure_curves(comparer, self.reference, self.curves, POINTS, bar.update)
        self._damages = [curve.damages() for curve in self.curves]

    def levels(self, share: float) -> list[int]:
        """The level of each site at a share of active experts."""
        return self._levels(share, self._corrections(share))

    def _levels(self, share: float, corrections: Anchor, reach: float = REACH) -> list[int]:
        knapsack = self._knapsack(corrections, reach)
        least = next(budget for budget in range(knapsack.size + 1) if np.isfinite(knapsack.damage(budget)))
        return knapsack.levels(max(least, round(share * UNITS)))

    def _knapsack(self, corrections: Anchor, reach: float = REACH) -> Knapsack:
        """All levels, or those whose mean count is within a ratio of the centre's (damage: infinite elsewhere)."""
        unit = self.total / UNITS
        costs, damages = [], []
        centre: Sequence[int | None] = corrections.centre or [None] * len(self.curves)
        for curve, damage, slope, count, middle in zip(
            self.curves, self._damages, corrections.slopes, corrections.counts, centre
        ):
            means = np.array([level.count for level in curve.levels])
            # the correction of counts ends where one or all experts are kept
            scaled = np.clip(means * count, min(1.0, means[0]), means[-1])
            costs.append(np.rint(scaled * curve.site.cost / unit).astype(int).tolist())
            near = np.ones(len(means), dtype=bool)
            if middle is not None:
                near = np.abs(np.log(means / means[middle])) <= math.log(reach)
                near[max(0, middle - 1) : middle + 2] = True
            damages.append(np.where(near, slope * damage, np.inf).tolist())
        return Knapsack(costs, damages)

    def policies(self, levels: Sequence[int]) -> Policies:
        """The policies of the levels."""
        found = {part: list(per_layer) for part, per_layer in self.reference.items()}
        for curve, level in zip(self.curves, levels):
            found[curve.site.part][curve.site.layer] = curve.levels[level].policy
        return found

    def corrected_near(self, share: float) -> bool:
        """Whether a correction was made near the share."""
        return any(abs(math.log(share) - anchor.place) < NEAR for anchor in self._anchors[1:])

    def correct(
        self, share: float, comparer: Comparer, rounds: int = 3, advance: Callable[[], Any] | None = None
    ) -> None:
        """Measure around the allocation of a share, re-solve, and again; the best allocation that came up stays.

        Args:
            share: share of active experts.
            comparer: holds the reference.
            rounds: how often.
            advance: called after each variant of each batch.
        """
        now, reach = self._corrections(share), REACH
        levels = self._levels(share, now)
        best: tuple[float, Anchor] | None = None
        for step in range(rounds + 1):
            found = self._measure_around(levels, comparer, advance if step < rounds else None, step < rounds)
            value = self._value(share, now, found)
            if best is None or value < best[0]:
                best = value, replace(now, centre=levels)
            else:  # a step too far: the next one is shorter, and from the best
                reach = math.sqrt(reach)
            if step < rounds:
                now = self._corrected(now, levels, found)
                again = self._levels(share, replace(now, centre=best[1].centre), reach)
                if again == levels:
                    break
                levels = again
        assert best is not None
        # the newest slopes: where they were measured is never far from the best allocation
        self._anchors.append(replace(now, place=math.log(share), centre=best[1].centre))

    def _value(self, share: float, corrections: Anchor, found: Around) -> float:
        """The measured damage, at what active experts cost there, were the measured share the one asked for."""
        knapsack = self._knapsack(corrections)
        low = round(share * 0.96 * UNITS)
        high = max(round(share * 1.04 * UNITS), low + 1)
        price = (knapsack.damage(low) - knapsack.damage(high)) / ((high - low) / UNITS)
        price = price if math.isfinite(price) else 0.0
        return found.base.damage + price * (self.share(found.active) - share)

    def share(self, active: ActiveExperts) -> float:
        """Measured share of active experts, weighted by their cost."""
        means = {part: active.mean(part) for part in active.counts}
        return sum(means[c.site.part][c.site.layer] * c.site.cost for c in self.curves) / self.total

    def _measure_around(
        self,
        levels: Sequence[int],
        comparer: Comparer,
        advance: Callable[[], Any] | None,
        neighbours: bool = True,
    ) -> Around:
        variants = [
            (curve.site, curve.levels[place])
            for curve, level in zip(self.curves, levels)
            for place in self._neighbours(curve, level)
            if neighbours
        ]
        return measure_variants(comparer, self.policies(levels), variants, advance)

    def _corrected(self, now: Anchor, levels: Sequence[int], found: Around) -> Anchor:
        slopes, counts = now.slopes.copy(), now.counts.copy()
        for index, (curve, level, known) in enumerate(zip(self.curves, levels, self._damages)):
            low, high = self._neighbours(curve, level)
            sparser, denser = found.variants[2 * index : 2 * index + 2]
            expected = known[low] - known[high]
            if expected > 0:
                ratio = min(CLIP, max(1 / CLIP, sparser.minus(denser).damage / expected))
                # half way, once there was a correction: measured around another allocation, it may overshoot
                slopes[index] = ratio if slopes[index] == 1 else math.sqrt(ratio * slopes[index])
            mean = found.active.mean(curve.site.part)[curve.site.layer]
            counts[index] = mean / curve.levels[level].count
        return Anchor(now.place, slopes, counts, now.centre)

    @staticmethod
    def _neighbours(curve: Curve, level: int) -> tuple[int, int]:
        """The levels about STEP below and above a level."""
        counts = np.log([entry.count for entry in curve.levels])
        low = int(np.abs(counts - (counts[level] - math.log(STEP))).argmin())
        high = int(np.abs(counts - (counts[level] + math.log(STEP))).argmin())
        return min(low, max(0, level - 1)), max(high, min(len(counts) - 1, level + 1))

    def _corrections(self, share: float) -> Anchor:
        anchors = sorted(self._anchors, key=lambda anchor: anchor.place)
        place, places = math.log(share), [anchor.place for anchor in anchors]

        def between(rows: Sequence[np.ndarray]) -> np.ndarray:
            return np.exp([np.interp(place, places, column) for column in np.log(rows).T])

        slopes, counts = ([getattr(a, name) for a in anchors] for name in ("slopes", "counts"))
        centres = [a for a in anchors if a.centre is not None and abs(a.place - place) < NEAR]
        centre = min(centres, key=lambda a: abs(a.place - place)).centre if centres else None
        return Anchor(place, between(slopes), between(counts), centre)

    def describe(self) -> dict[str, Any]:
        """Curves and corrections, JSON-able."""
        return {
            "curves": [_described(curve.site, curve.points) for curve in self.curves],
            "corrections": [
                {
                    "share": math.exp(anchor.place),
                    "slopes": [round(float(ratio), 4) for ratio in anchor.slopes],
                    "counts": [round(float(ratio), 4) for ratio in anchor.counts],
                }
                for anchor in self._anchors[1:]
            ],
        }


def _described(site: Site, points: Sequence[Point]) -> dict[str, Any]:
    rows = [
        {
            "mean_active": round(point.count, 4),
            "kl": point.kl,
            "loss_increase": point.loss_increase,
            "standard_error": point.standard_error,
        }
        for point in points
    ]
    return {"part": site.part, "layer": site.layer, "points": rows}
