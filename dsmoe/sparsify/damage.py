"""Damage curves: what making one site sparser costs, everything else staying as it is.

Only the layers from the site on are run: the inputs of all layers are kept from one pass of a batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from dsmoe.sparsify.compare import Comparer, Policies, clustered_error, expected_increase, with_policies
from dsmoe.sparsify.families import Level
from dsmoe.sparsify.measure import ActiveExperts, count_experts
from dsmoe.sparsify.sites import Site
from dsmoe.sparsify.suffix import fast_masking, run_layers


class Distance(NamedTuple):
    """Of a sparse model from its reference, token by token.

    Attributes:
        kl: [T] KL divergence, nats.
        increase: [T] loss increase, nats.
        clusters: [T] cluster of each token.
    """

    kl: np.ndarray
    increase: np.ndarray
    clusters: np.ndarray

    def minus(self, other: "Distance") -> "Distance":
        """Token by token: what this model's distance is beyond another's."""
        return Distance(self.kl - other.kl, self.increase - other.increase, self.clusters)

    @property
    def standard_error(self) -> float:
        """Of the mean increase."""
        return clustered_error(self.increase, self.clusters)

    @property
    def damage(self) -> float:
        """See `expected_increase`."""
        return expected_increase(float(self.kl.mean()), float(self.increase.mean()), self.standard_error)


@dataclass
class Point:
    """One measurement of a site.

    Attributes:
        level: index of the site's level.
        count: its mean active experts.
        kl: KL divergence from the reference, nats per token.
        loss_increase: paired, nats per token.
        standard_error: of the increase.
    """

    level: int
    count: float
    kl: float
    loss_increase: float
    standard_error: float


class Around(NamedTuple):
    """Models that differ from a base in one site each, and the base itself.

    Attributes:
        base: its distance from the reference.
        active: kept experts of the base.
        variants: distances of the others.
    """

    base: Distance
    active: ActiveExperts
    variants: list[Distance]


@dataclass
class Curve:
    """KL divergence of a site at each of its levels, interpolated between the measured points.

    The KL divergence gives the shape, as it is known precisely, positive and monotone; by how much the loss itself
    rises is measured around an allocation (see `dsmoe.sparsify.allocation`).

    Attributes:
        site: where.
        levels: by rising count; the last is the reference.
        points: measured.
    """

    site: Site
    levels: list[Level]
    points: list[Point] = field(default_factory=list)

    def damages(self) -> np.ndarray:
        """Damage at every level: PCHIP through the square roots over the logarithm of the count.

        A square root, since damage grows about as the square of what is left out; PCHIP, since it doesn't overshoot.
        """
        x = np.log([level.count for level in self.levels])
        known = {point.level: point.kl for point in self.points}
        known[len(self.levels) - 1] = 0.0
        places = sorted(known)
        if len(places) == 1:
            return np.zeros(len(x))
        values = np.array([max(0.0, known[place]) for place in places])
        # fewer experts never do less damage, but for noise
        roots = np.sqrt(np.maximum.accumulate(values[::-1])[::-1])
        return PchipInterpolator(x[places], roots)(x) ** 2


def spread(levels: Sequence[Level], points: int) -> list[int]:
    """Indices of about so many levels, at counts spaced geometrically from the least; without the reference."""
    if len(levels) == 1:
        return []
    logs = np.log([level.count for level in levels])
    targets = np.linspace(logs[0], logs[-1], points + 1)[:-1]
    return sorted({int(np.abs(logs[:-1] - target).argmin()) for target in targets})


def measure_variants(
    comparer: Comparer,
    base: Policies,
    variants: Sequence[tuple[Site, Level]],
    advance: Callable[[], Any] | None = None,
) -> Around:
    """Measure models that differ from a base in one site each.

    Args:
        comparer: holds the reference that all are compared with.
        base: policies of all sites.
        variants: site and level each.
        advance: called after each variant of each batch.

    Returns:
        The distances of the base and of every variant from the reference.
    """
    model = comparer.model
    base_rows: list[tuple[Tensor, Tensor]] = []
    active = ActiveExperts()
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in variants]
    with torch.inference_mode(), fast_masking(model):
        for index, batch in enumerate(comparer.batches):
            with with_policies(model, base):
                done = run_layers(model, batch, keep_inputs=True)
                count_experts(active, model, batch, done.router_logits)
            base_rows.append(comparer.distance(index, done.hidden)[:2])
            for rows, (site, level) in zip(found, variants):
                changed = {part: list(per_layer) for part, per_layer in base.items()}
                changed[site.part][site.layer] = level.policy
                with with_policies(model, changed):
                    hidden = run_layers(model, batch, site.layer, done.inputs[site.layer]).hidden
                rows.append(comparer.distance(index, hidden)[:2])
                if advance is not None:
                    advance()
    ids = comparer.cluster_ids()
    distances = []
    for rows in (base_rows, *found):
        kl, increase = (torch.cat(column).double().cpu().numpy() for column in zip(*rows))
        distances.append(Distance(kl, increase, ids))
    return Around(distances[0], active, distances[1:])


def measure_curves(
    comparer: Comparer,
    reference: Policies,
    curves: Sequence[Curve],
    points: int,
    advance: Callable[[], Any] | None = None,
) -> None:
    """Measure the points of all curves, each site alone being sparse.

    Args:
        comparer: holds the reference.
        reference: its policies.
        curves: their `points` are set.
        points: measured points of a curve, about.
        advance: see `measure_variants`.
    """
    chosen = [spread(curve.levels, points) for curve in curves]
    variants = [(curve.site, curve.levels[i]) for curve, places in zip(curves, chosen) for i in places]
    measured = iter(measure_variants(comparer, reference, variants, advance).variants)
    for curve, places in zip(curves, chosen):
        curve.points = []
        for place in places:
            far = next(measured)
            curve.points.append(
                Point(
                    place, curve.levels[place].count, float(far.kl.mean()), float(far.increase.mean()),
                    far.standard_error,
                )
            )  # fmt: skip
