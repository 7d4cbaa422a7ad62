"""Batched Levenberg-Marquardt and the multi-start of a fit.

All problems of a batch (starts, bootstrap draws, points of a profile) are solved side by side. Steps, damping and the
stopping rule depend on ratios only, so that a factor on an objective changes nothing: replications of scaling laws have
failed on optimisers that stopped early because the loss was small.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsmoe.planner.fit.forms import (
    ABSENT,
    INDEX,
    NAMES,
    SATURATION_BOX,
    START_BOX,
    WALL,
    Array,
    Design,
    into_box,
    off_the_walls,
)
from dsmoe.planner.fit.objective import Objective
from dsmoe.planner.fit.structure import Structure
from dsmoe.planner.laws import PUBLISHED_JOINT

ROUNDING = 1e-14  # of ln loss; residuals below it are noise of the arithmetic
DECREMENT = 1e-18  # predicted decrease that counts as none, as a share of the objective


@dataclass(frozen=True)
class Solution:
    """Minima of a batch.

    Args:
        theta: [S, P].
        value: objectives, [S].
        converged: whether no relative decrease was left, [S].
        iterations: that the slowest problem took.
    """

    theta: Array
    value: Array
    converged: NDArray[np.bool_]
    iterations: int


def minimise(objective: Objective, theta_SP: Array, basis_PQ: Array, max_iterations: int = 400) -> Solution:
    """Minimise each objective over theta + basis @ y.

    Args:
        objective: S objectives.
        theta_SP: starts.
        basis_PQ: directions that are free, [P, Q] (the same for all) or [S, P, Q].
        max_iterations: at most so many steps.
    """
    theta = off_the_walls(theta_SP)
    value = objective.value(theta)
    basis = np.broadcast_to(basis_PQ, (len(theta), *basis_PQ.shape[-2:]))
    damping = np.full(len(theta), 1e-3)
    done = ~np.isfinite(value)
    floor = np.broadcast_to(objective.weights.sum(axis=1), value.shape) * ROUNDING**2
    iteration = 0
    for iteration in range(1, max_iterations + 1):  # noqa: B007
        (live,) = np.nonzero(~done)
        if not len(live):
            break
        some = objective.of(live)
        step, decrement = _step(some, theta[live], basis[live], damping[live])
        small = (decrement <= DECREMENT * value[live]) | (value[live] <= floor[live])
        tried = off_the_walls(theta[live] + step)
        new = some.value(tried)
        better = new < value[live]
        # at full precision the decrease drowns in rounding: accept no step, and stop
        stuck = ~better & (damping[live] > 1e12)
        theta[live[better]], value[live[better]] = tried[better], new[better]
        damping[live] = np.where(better, np.maximum(damping[live] / 6, 1e-15), damping[live] * 5)
        done[live[small | stuck]] = True
    return Solution(theta, value, done & np.isfinite(value), iteration)


def _step(objective: Objective, theta: Array, basis: Array, damping: Array) -> tuple[Array, Array]:
    """Damped Gauss-Newton step in theta, and the decrease that it predicts."""
    jacobian, gradient_SP, weights = objective.expansion(theta)
    basis = np.where(_held(theta, gradient_SP)[:, :, None], 0.0, basis)
    reduced = np.matmul(basis.transpose(0, 2, 1), jacobian)  # [S, Q, R]
    gradient = np.einsum("spq,sp->sq", basis, gradient_SP)
    hessian = np.matmul(reduced * weights[:, None], reduced.transpose(0, 2, 1))
    scale = np.sqrt(np.einsum("sqq->sq", hessian))
    scale = np.where(scale > 0, scale, np.maximum(scale.max(axis=1, keepdims=True), 1e-300))
    unit = hessian / scale[:, :, None] / scale[:, None, :]
    index = np.arange(unit.shape[1])
    unit[:, index, index] = np.where(unit[:, index, index] > 0, 1.0, 0.0) + damping[:, None] + 1e-15
    right = gradient / scale
    solved = -np.linalg.solve(unit, right[:, :, None])[:, :, 0]
    decrement = -0.5 * np.einsum("sq,sq->s", solved, right)
    # a single step that leaves the region where the expansion means anything is cut
    step = np.einsum("spq,sq->sp", basis, solved / scale)
    longest = np.max(np.abs(step), axis=1, keepdims=True)
    return step * np.minimum(1.0, 3.0 / np.maximum(longest, 1e-300)), decrement


def _held(theta: Array, gradient: Array) -> Any:
    """Whether a parameter of a box stands at its wall and would go on into it, [S, P]."""
    held = (np.abs(theta) >= WALL) & (np.sign(gradient) == -np.sign(theta))
    held[:, [i for i, name in enumerate(NAMES) if name not in ("start", "saturation")]] = False
    return held


def free_basis(structure: Structure) -> Array:
    """Unit vectors of the free parameters, [P, Q]."""
    return np.eye(len(NAMES))[:, structure.columns]


def base_point(structure: Structure) -> Array:
    """Values of the fixed parameters, [P]; those of the free ones are placeholders."""
    theta = np.zeros(len(NAMES))
    law = PUBLISHED_JOINT
    inner = 1 / (1 / law.e_start - 1 / law.e_max)
    theta[INDEX["start"]] = into_box(float(np.log(inner)), START_BOX)
    theta[INDEX["saturation"]] = into_box(float(np.log(law.e_max)), SATURATION_BOX)
    # the exponent of a term that is not there has no effect; readers of the law want a negative one
    if not structure.has_size:
        theta[[INDEX["log_a"], INDEX["alpha"]]] = ABSENT, law.alpha
    if not structure.has_tokens:
        theta[[INDEX["log_b"], INDEX["beta"]]] = ABSENT, law.beta
    return theta


def starts(structure: Structure, design: Design, log_loss: Array) -> Array:
    """A grid of starts, [S, P]: exponents, the share of the irreducible loss, and the effect of experts.

    The amplitudes follow from the mean loss, so that every start is near the data at their centre.
    """
    exponents = (-0.08, -0.2, -0.45)
    grids: dict[str, tuple[Any, ...]] = {
        "alpha": exponents if structure.has_size else (PUBLISHED_JOINT.alpha,),
        "beta": exponents if structure.has_tokens else (PUBLISHED_JOINT.beta,),
        "share": (0.2, 0.5, 0.8),
        "delta": (-0.2, 0.05) if "delta" in structure.free else (0.0,),
        "omega": (0.0, 0.1) if "omega" in structure.free else (0.0,),
        "inner": (0.7, 4.0) if "start" in structure.free else (None,),
        "e_max": (30.0, 1000.0) if "saturation" in structure.free else (None,),
    }
    lowest, mean = float(np.exp(log_loss.min())), float(np.exp(log_loss.mean()))
    parts = structure.has_size + structure.has_tokens
    made = []
    for alpha, beta, share, delta, omega, inner, e_max in itertools.product(*grids.values()):
        theta = base_point(structure)
        theta[INDEX["log_c"]] = np.log(share * lowest)
        for name, present in (("log_a", structure.has_size), ("log_b", structure.has_tokens)):
            if present:
                theta[INDEX[name]] = np.log((mean - share * lowest) / parts)
        theta[[INDEX["alpha"], INDEX["beta"]]] = alpha or 0.0, beta or 0.0
        theta[[INDEX["delta"], INDEX["omega"]]] = delta or 0.0, omega or 0.0
        if inner is not None:
            theta[INDEX["start"]] = into_box(float(np.log(inner)), START_BOX)
        if e_max is not None:
            theta[INDEX["saturation"]] = into_box(float(np.log(e_max)), SATURATION_BOX)
        made.append(theta)
    return np.array(made)


def multi_start(objective: Objective, structure: Structure, keep: int = 6) -> Solution:
    """The best minimum from a grid of starts: a few steps from each, more from the better, the best to full precision.

    Args:
        objective: one objective.
        structure: the form.
        keep: minima that are followed to the end.
    """
    basis = free_basis(structure)
    grid = starts(structure, objective.design, objective.log_loss)
    first = minimise(objective, grid, basis, max_iterations=8)
    # after eight steps the good basins stand out; a quarter of the starts leaves room for those that are slow to show
    better = first.theta[np.argsort(first.value)[: max(len(grid) // 4, keep)]]
    second = minimise(objective, better, basis, max_iterations=22)
    best = second.theta[np.argsort(second.value)[:keep]]
    last = minimise(objective, best, basis)
    winner = [int(np.argmin(last.value))]
    polished = minimise(objective, last.theta[winner], basis)
    return Solution(polished.theta, polished.value, polished.converged, last.iterations)
