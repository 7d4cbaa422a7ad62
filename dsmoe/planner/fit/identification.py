"""What the data identify: each coefficient is moved while all others are fitted again (a profile).

A coefficient is identified if doubling it, and halving it (a, b, c, e_start, e_max, eta) or setting it to zero (the
others), makes the fit worse both beyond the noise (90%) and by something that matters in nats. Bootstrap intervals alone
can't judge this: that of e_max is tight where the optimiser just stays near its start. `LawFit.identified` asks for both.
"""

from dataclasses import dataclass

import numpy as np

from dsmoe.planner.fit.coefficients import PARAMETER, linear_map
from dsmoe.planner.fit.forms import (
    INDEX,
    NAMES,
    SATURATION_BOX,
    START_BOX,
    Array,
    into_box,
    out_of_box,
    predict,
)
from dsmoe.planner.fit.objective import Objective
from dsmoe.planner.fit.solve import free_basis, minimise
from dsmoe.planner.fit.structure import Structure

FACTOR = 2.0
CHI_SQUARED_90 = 2.706  # one degree of freedom
NOISE_FLOOR = 1e-3  # nats; no two seeds of a run agree better
MATERIAL = 5e-4  # nats; a root mean square change of the fit below this has no consequence


@dataclass(frozen=True)
class Profile:
    """The fit with one coefficient moved, all others fitted again.

    Args:
        deviance: smaller of the two increases of -2 ln likelihood.
        change: smaller of the two root mean square changes of the fitted loss, in nats.
        identified: whether both are large enough.
    """

    deviance: float
    change: float
    identified: bool


def profiles(objective: Objective, theta: Array, structure: Structure) -> dict[str, Profile]:
    """A profile for each free coefficient.

    Args:
        objective: the one objective.
        theta: its minimum, [P].
        structure: the form.

    Returns:
        Coefficient name (of `JointLaw`, or the DS-MoE form's) to profile.
    """
    names = [name for name, parameter in PARAMETER.items() if parameter in structure.free]
    constraints = [_constraint(name, theta, objective) for name in names]
    if structure.dsmoe_form is not None:
        names.append(structure.dsmoe_form)
        unit = np.eye(len(NAMES))[INDEX["dsmoe"]]
        moved = np.log(FACTOR) if structure.dsmoe_form == "eta" else (FACTOR - 1) * theta[INDEX["dsmoe"]]
        constraints.append((unit, (moved, -moved)))
    if len(structure.free) == 1:
        return {name: Profile(np.inf, np.inf, True) for name in names}
    normals = np.repeat([normal for normal, _ in constraints], 2, axis=0)  # [2K, P]
    shifts = np.array([shift for _, both in constraints for shift in both])
    start, basis = _constrained(objective, theta, structure, normals, shifts)
    rows = np.zeros(len(start), dtype=int)
    found = minimise(objective.of(rows), start, basis, max_iterations=150)
    deviance, change = _consequences(objective, theta, found.theta, found.value, len(structure.free))
    return {
        name: Profile(
            float(min(deviance[2 * i : 2 * i + 2])),
            float(min(change[2 * i : 2 * i + 2])),
            bool(
                min(deviance[2 * i : 2 * i + 2]) > CHI_SQUARED_90
                and min(change[2 * i : 2 * i + 2]) > MATERIAL
            ),
        )
        for i, name in enumerate(names)
    }


def _constraint(name: str, theta: Array, objective: Objective) -> tuple[Array, tuple[float, float]]:
    """Direction n and shifts s such that n . theta moves by s when the coefficient moves by FACTOR either way."""
    if name in ("e_start", "e_max"):
        box = START_BOX if name == "e_start" else SATURATION_BOX
        index = INDEX[PARAMETER[name]]
        here = float(out_of_box(theta[index], box))
        edge = 1e-6 * (box[1] - box[0])
        both = [np.clip(here + sign * np.log(FACTOR), box[0] + edge, box[1] - edge) for sign in (1, -1)]
        up, down = (into_box(float(value), box) - theta[index] for value in both)
        return np.eye(len(NAMES))[index], (up, down)
    normal = linear_map(objective.design)[INDEX[PARAMETER[name]]]
    if name in ("a", "b", "c"):
        return normal, (np.log(FACTOR), -np.log(FACTOR))
    move = (FACTOR - 1) * float(normal @ theta)
    return normal, (move, -move)


def _constrained(
    objective: Objective, theta: Array, structure: Structure, normals: Array, shifts: Array
) -> tuple[Array, Array]:
    """Starts that satisfy the constraints along the valley of the objective, and bases that keep them."""
    free = free_basis(structure)
    jacobian, _, weights = objective.expansion(theta[None])
    reduced = free.T @ jacobian[0]
    hessian = (reduced * weights[0]) @ reduced.T
    hessian += 1e-12 * np.trace(hessian) * np.eye(len(hessian)) / len(hessian)
    inside = normals @ free  # [K, Q]
    valley = np.linalg.solve(hessian, inside.T).T
    step = valley * (shifts / np.einsum("kq,kq->k", inside, valley))[:, None]
    bases = []
    for normal in inside:
        q, _ = np.linalg.qr(np.column_stack([normal, np.eye(len(normal))]))
        bases.append(free @ q[:, 1 : len(normal)])
    # a long way down a curved valley the expansion may lead nowhere: then start from the nearest point instead
    nearest = inside * (shifts / np.einsum("kq,kq->k", inside, inside))[:, None]
    starts = np.stack([theta + step @ free.T, theta + nearest @ free.T])
    values = np.stack([objective.value(start) for start in starts])
    chosen = starts[np.argmin(values, axis=0), np.arange(len(shifts))]
    return chosen, np.array(bases)


def _consequences(
    objective: Objective, theta: Array, moved: Array, value: Array, coefficients: int
) -> tuple[Array, Array]:
    design, weight = objective.design, float(objective.weights.mean())
    before, after = predict(theta[None], design)[0], predict(moved, design)[0]
    runs = before.shape[1]
    mean_loss = float(np.exp(before).mean())
    least = float(objective.value(theta[None])[0]) / weight
    variance = max(2 * least / max(1, runs - coefficients), (NOISE_FLOOR / mean_loss) ** 2)
    deviance = 2 * (value / weight - least) / variance
    change = np.sqrt(np.mean((np.exp(after) - np.exp(before)) ** 2, axis=1))
    return deviance, change
