"""The parametric forms: ln loss of many parameter sets at once, with derivatives.

Shapes: S problems solved side by side, R runs, P parameters. Internally the logarithms of N, D and E hat are centred on
the data, which makes the parameters nearly independent; `dsmoe.planner.fit.coefficients` has the way back.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsmoe.planner.fit.runs import Run
from dsmoe.planner.laws import PUBLISHED_JOINT

Array = NDArray[np.float64]
NAMES = (
    "log_a", "alpha", "delta", "gamma", "log_b", "beta", "omega", "zeta", "start", "saturation", "log_c", "dsmoe",
)  # fmt: skip
INDEX = {name: index for index, name in enumerate(NAMES)}
# Boxes of ln(inner at E = 1) and ln(e_max), reached through a sigmoid. An e_max of a few experts leaves E hat hardly any
# range, and its exponents, alpha and beta at E hat = 1 among them, then run to absurd values with the same predictions.
START_BOX = (np.log(0.02), np.log(1e3))
SATURATION_BOX = (np.log(10.0), np.log(1e5))
WALL = 10.0  # of the unbounded parameters of the boxes: further out their derivatives vanish and they would be stuck
ABSENT = -200.0  # logarithm of a term that is fixed at nothing


@dataclass(frozen=True)
class Design:
    """The runs as arrays, centred; all of shape [R] but the centres.

    Args:
        log_size: ln N minus its centre (of a DS-MoE N is all its parameters).
        log_tokens: ln D minus its centre.
        experts: distinct E of the law, a DS-MoE counting as E = 1.
        which: for each run its place in `experts`.
        dsmoe_factor: d ln N / d (DS-MoE parameter): 1 ("eta") or -ln num_experts ("kappa") in a DS-MoE, 0 elsewhere.
        centre: (of ln E hat, of ln N, of ln D).
    """

    log_size: Array
    log_tokens: Array
    experts: Array
    which: NDArray[np.intp]
    dsmoe_factor: Array
    centre: tuple[float, float, float]


def make_design(
    runs: Sequence[Run],
    dsmoe_form: str | None = None,
    centre: tuple[float, float, float] | None = None,
) -> Design:
    """Arrays of the runs.

    Args:
        runs: the runs.
        dsmoe_form: as in `Structure`.
        centre: of another design, to evaluate its parameters here; None: this design's own.
    """
    is_dsmoe = np.array([run.kind == "dsmoe" for run in runs])
    size = np.log([run.num_params_total if run.kind == "dsmoe" else run.num_params_active for run in runs])
    tokens = np.log([run.tokens for run in runs])
    law_experts = np.where(is_dsmoe, 1.0, [run.num_experts for run in runs])
    experts, which = np.unique(law_experts, return_inverse=True)
    if centre is None:
        # of ln E hat at the published e_start and e_max; any constant would do
        effective = np.log([PUBLISHED_JOINT.effective_experts(float(e)) for e in experts])[which]
        centre = (float(effective.mean()), float(size.mean()), float(tokens.mean()))
    slope = np.ones(len(runs)) if dsmoe_form != "kappa" else -np.log([run.num_experts for run in runs])
    return Design(
        size - centre[1],
        tokens - centre[2],
        experts,
        which.reshape(-1),
        np.where(is_dsmoe, slope, 0.0),
        centre,
    )


def off_the_walls(theta_SP: Array, wall: float = WALL) -> Array:
    """The same parameters with those of the boxes at most `wall` from the middle."""
    clipped = theta_SP.copy()
    inside = slice(INDEX["start"], INDEX["saturation"] + 1)
    clipped[:, inside] = np.clip(clipped[:, inside], -wall, wall)
    return clipped


def into_box(value: float, box: tuple[float, float]) -> float:
    """The unbounded parameter of a value inside a box."""
    share = (value - box[0]) / (box[1] - box[0])
    return float(np.log(share / (1 - share)))


def _sigmoid(t: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * t))


def out_of_box(t: Array, box: tuple[float, float]) -> Array:
    """The inverse of `into_box`."""
    return box[0] + (box[1] - box[0]) * _sigmoid(np.asarray(t, dtype=float))


def log_effective(theta_SP: Array, experts: Array) -> tuple[Array, Array, Array]:
    """ln E hat of shape [S, U] for U numbers of experts, and its derivatives to "start" and "saturation"."""
    t_start, t_max = theta_SP[:, INDEX["start"], None], theta_SP[:, INDEX["saturation"], None]
    first = np.exp(out_of_box(t_start, START_BOX))
    inverse_max = np.exp(-out_of_box(t_max, SATURATION_BOX))
    inner = experts - 1 + first
    inverse = 1 / inner + inverse_max
    shares = _sigmoid(t_start), _sigmoid(t_max)
    d_start = first / (inner**2 * inverse) * (START_BOX[1] - START_BOX[0]) * shares[0] * (1 - shares[0])
    d_max = inverse_max / inverse * (SATURATION_BOX[1] - SATURATION_BOX[0]) * shares[1] * (1 - shares[1])
    return -np.log(inverse), d_start, d_max


def predict(theta_SP: Array, design: Design, jacobian: bool = False) -> tuple[Array, Array | None]:
    """ln loss of shape [S, R] and, if asked for, its derivatives [S, P, R].

    Args:
        theta_SP: parameters of S problems, in the order of NAMES, centred.
        design: the runs.
        jacobian: whether to return the derivatives.
    """
    log_a, alpha, delta, gamma, log_b, beta, omega, zeta, _, _, log_c, dsmoe = (
        theta_SP[:, i, None] for i in range(len(NAMES))
    )
    h_SU, start_SU, max_SU = log_effective(theta_SP, design.experts)
    h = (h_SU - design.centre[0])[:, design.which]
    x, y = design.log_size + dsmoe * design.dsmoe_factor, design.log_tokens
    slope_x, slope_y = alpha + gamma * h, beta + zeta * h
    u, v = log_a + delta * h + slope_x * x, log_b + omega * h + slope_y * y
    top = np.maximum(np.maximum(u, v), log_c)
    eu, ev, ec = np.exp(u - top), np.exp(v - top), np.exp(log_c - top)
    total = eu + ev + ec
    log_loss = top + np.log(total)
    if not jacobian:
        return log_loss, None
    su, sv, sc = eu / total, ev / total, ec / total
    by_h = su * (delta + gamma * x) + sv * (omega + zeta * y)
    out = np.empty((theta_SP.shape[0], len(NAMES), len(design.which)))
    out[:, 0], out[:, 1], out[:, 2], out[:, 3] = su, su * x, su * h, su * h * x
    out[:, 4], out[:, 5], out[:, 6], out[:, 7] = sv, sv * y, sv * h, sv * h * y
    out[:, 8], out[:, 9] = by_h * start_SU[:, design.which], by_h * max_SU[:, design.which]
    out[:, 10], out[:, 11] = sc, su * slope_x * design.dsmoe_factor
    return log_loss, out
