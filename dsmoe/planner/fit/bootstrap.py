"""Bootstrap refits, all draws solved side by side from the fit as their start.

"residuals" keeps the design and draws residuals, as a sweep's design is chosen, not drawn, and dropping runs of a small
one leaves coefficients undetermined. They are enlarged by n / (n - p): once the square root for the freedom that the fit
used up and once more as the jackknife (HC3) does, because with the square root alone the intervals of small sweeps cover
too little (tests/test_planner_fit_decisions.py measures it). "runs" draws configurations with all their seeds, which also
holds where the noise depends on the size, and covers less in small sweeps.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsmoe.planner.fit.forms import Array, off_the_walls, predict
from dsmoe.planner.fit.objective import Objective
from dsmoe.planner.fit.solve import Solution, free_basis, minimise
from dsmoe.planner.fit.structure import Structure

METHODS = ("residuals", "runs")
CHUNK_NUMBERS = 4_000_000  # of the largest array in memory


def bootstrap(
    objective: Objective,
    theta: Array,
    structure: Structure,
    groups: Sequence[int],
    draws: int = 200,
    seed: int = 0,
    method: str = "residuals",
) -> Solution:
    """Refit `draws` times.

    Args:
        objective: the one objective.
        theta: its minimum, [P].
        structure: the form.
        groups: group of each run; the runs of a group are seeds of one configuration.
        draws: how many.
        seed: of the draws.
        method: one of METHODS.
    """
    rng = np.random.default_rng(seed)
    members = np.asarray(groups)
    fitted = predict(theta[None], objective.design)[0]
    if method == "runs":
        counts = rng.multinomial(
            members.max() + 1, np.full(members.max() + 1, 1 / (members.max() + 1)), draws
        )
        log_loss, weights = objective.log_loss, objective.weights * counts[:, members]
    else:
        noise = _residual_draws(objective.log_loss[0] - fitted[0], members, len(structure.free), draws, rng)
        log_loss, weights = fitted + noise, objective.weights
    start = off_the_walls(theta[None], 5.0)
    drawn = Objective(objective.design, log_loss, weights, objective.huber_delta)
    chunk = max(1, CHUNK_NUMBERS // (len(members) * theta.size))
    solved = [
        minimise(drawn.of(rows), np.repeat(start, len(rows), axis=0), free_basis(structure), 200)
        for rows in np.array_split(np.arange(draws), -(-draws // chunk))
    ]
    return Solution(
        np.concatenate([part.theta for part in solved]),
        np.concatenate([part.value for part in solved]),
        np.concatenate([part.converged for part in solved]),
        max(part.iterations for part in solved),
    )


def _residual_draws(
    residual: Array, groups: NDArray[np.intp], coefficients: int, draws: int, rng: np.random.Generator
) -> Array:
    """Residuals [draws, R]: a part that a configuration's seeds share, and a part of each seed."""
    sizes = np.bincount(groups)
    shared = np.bincount(groups, residual) / sizes
    own = residual - shared[groups]
    # the fit used up freedom of the configurations' means; a group's mean uses up one of its seeds
    shared = shared - shared.mean()
    shared *= len(sizes) / max(1, len(sizes) - coefficients)
    drawn = shared[rng.integers(len(sizes), size=(draws, len(sizes)))][:, groups]
    several = np.flatnonzero(sizes[groups] > 1)
    if len(several):
        pool = own[several] * np.sqrt(sizes[groups] / np.maximum(1, sizes[groups] - 1))[several]
        extra = rng.choice(pool, size=(draws, len(residual)))
        drawn = drawn + extra - _group_means(extra, groups, sizes)
    return drawn


def _group_means(values: Array, groups: NDArray[np.intp], sizes: NDArray[np.intp]) -> Array:
    """Each entry's group mean; a draw of the shared part already holds the seeds' part of a mean."""
    members = groups[:, None] == np.arange(len(sizes))
    return (values @ members / sizes)[:, groups]


def interval(values: Array, level: float = 0.9) -> tuple[float, float] | None:
    """The central interval of the finite draws; None if fewer than half or fewer than two are finite."""
    finite = values[np.isfinite(values)]
    if 2 * len(finite) < len(values) or len(finite) < 2:
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
