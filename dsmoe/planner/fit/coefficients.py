"""From centred parameters to the coefficients of `dsmoe.planner.laws`, at full precision."""

import numpy as np

from dsmoe.planner.fit.forms import (
    ABSENT,
    INDEX,
    NAMES,
    SATURATION_BOX,
    START_BOX,
    Array,
    Design,
    out_of_box,
)
from dsmoe.planner.fit.structure import Structure
from dsmoe.planner.laws import COEFFICIENTS, JointLaw

# parameter behind each coefficient
PARAMETER = dict(zip(COEFFICIENTS, ("log_a", "alpha", "delta", "gamma", "log_b", "beta", "omega", "zeta", "start",
                                    "saturation", "log_c")))  # fmt: skip


def linear_map(design: Design) -> Array:
    """Matrix [P, P] from centred parameters to raw ones (the others map to themselves)."""
    h0, x0, y0 = design.centre
    matrix = np.eye(len(NAMES))
    for names, z0 in ((("log_a", "alpha", "delta", "gamma"), x0), (("log_b", "beta", "omega", "zeta"), y0)):
        level, slope, main, interaction = (INDEX[name] for name in names)
        matrix[main, interaction] = -z0
        matrix[slope, interaction] = -h0
        # log_a = la - delta h0 - alpha x0 - gamma h0 x0 with the raw delta and alpha of the rows above
        matrix[level, [main, slope, interaction]] = -h0, -z0, h0 * z0
    return matrix


def coefficients(theta_SP: Array, design: Design, structure: Structure) -> dict[str, Array]:
    """Every coefficient of the law (and "eta" or "kappa"), each [S]."""
    raw = theta_SP @ linear_map(design).T
    found = {name: raw[:, INDEX[parameter]] for name, parameter in PARAMETER.items()}
    for name in ("a", "b", "c"):
        found[name] = np.where(
            theta_SP[:, INDEX[PARAMETER[name]]] <= ABSENT / 2, 0.0, np.exp(np.minimum(found[name], 700.0))
        )
    inner = np.exp(out_of_box(theta_SP[:, INDEX["start"]], START_BOX))
    e_max = np.exp(out_of_box(theta_SP[:, INDEX["saturation"]], SATURATION_BOX))
    found["e_start"], found["e_max"] = 1 / (1 / inner + 1 / e_max), e_max
    if structure.dsmoe_form == "eta":
        found["eta"] = np.exp(theta_SP[:, INDEX["dsmoe"]])
    elif structure.dsmoe_form == "kappa":
        found["kappa"] = theta_SP[:, INDEX["dsmoe"]]
    return found


def joint_law(values: dict[str, float]) -> JointLaw:
    """The law of one set of coefficients."""
    return JointLaw(**{name: float(values[name]) for name in COEFFICIENTS})
