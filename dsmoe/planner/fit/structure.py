"""Which coefficients of a form a set of runs can determine, by its design alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsmoe.errors import UserError
from dsmoe.planner.fit.forms import INDEX, NAMES
from dsmoe.planner.fit.runs import Run

DSMOE_FORMS = ("eta", "kappa")
FEW_PER_CENT = 1.2  # a ratio of largest to smallest below this counts as constant


@dataclass(frozen=True)
class Structure:
    """Which parameters are free, and what to say of the others.

    Args:
        law: "chinchilla", "joint", or with a DS-MoE term "joint_dsmoe" (also where no SMoE is among the runs).
        free: names of the free parameters, a subset of NAMES.
        dsmoe_form: None; "eta": loss = dense(eta * N_total); "kappa": the same with eta = num_experts**-kappa.
        notes: a sentence for each group of fixed coefficients.
        has_size, has_tokens: whether the terms of N and of D are there at all.
    """

    law: str
    free: tuple[str, ...]
    dsmoe_form: str | None
    notes: tuple[str, ...]
    has_size: bool
    has_tokens: bool

    @property
    def columns(self) -> NDArray[np.intp]:
        """Positions of the free parameters in NAMES."""
        return np.array([INDEX[name] for name in self.free])


def _distinct(values: Sequence[float]) -> int:
    """Values that differ by more than five per cent."""
    logs = np.sort(np.log(values))
    return 1 + int(np.sum(np.diff(logs) > np.log(1.05)))


def choose_structure(runs: Sequence[Run], law: str | None = None, dsmoe_form: str = "eta") -> Structure:
    """The largest form that the design of the runs can determine.

    Args:
        runs: all runs.
        law: "chinchilla" or "joint" to force; None: joint where there are SMoEs.
        dsmoe_form: used where there are DS-MoEs.

    Raises:
        UserError: nothing varies, or there are fewer distinct runs than coefficients.
    """
    experts = sorted({1.0 if run.kind == "dsmoe" else run.num_experts for run in runs})
    sizes = [run.num_params_total if run.kind == "dsmoe" else run.num_params_active for run in runs]
    tokens = [run.tokens for run in runs]
    if law == "chinchilla" and experts != [1.0]:
        raise UserError(
            f"the Chinchilla form is for dense runs; the data have num_experts {_listed(experts)}"
        )
    joint = law == "joint" or (law is None and len(experts) > 1)
    free, notes = {"log_c"}, []
    has_size, has_tokens = max(sizes) / min(sizes) > FEW_PER_CENT, max(tokens) / min(tokens) > FEW_PER_CENT
    if not has_size and not has_tokens:
        raise UserError("neither parameters nor tokens vary between the runs; a law needs one that does")
    if has_size:
        free |= {"log_a", "alpha"}
    else:
        notes.append(
            "parameters hardly vary: a, alpha, delta and gamma are not identified; their term is part of c"
        )
    if has_tokens:
        free |= {"log_b", "beta"}
    else:
        notes.append(
            "tokens hardly vary: b, beta, omega and zeta are not identified; their term is part of c"
        )
    if joint:
        added, said = _expert_terms(runs, experts, has_size, has_tokens)
        free |= added
        notes += said
    dsmoe = [run for run in runs if run.kind == "dsmoe"]
    if dsmoe:
        free.add("dsmoe")
        if len(dsmoe) == len(runs):
            raise UserError("all runs are DS-MoEs; their term is relative to dense runs, so some are needed")
        if not has_size:
            raise UserError(
                "DS-MoEs are compared with dense models of another size, but parameters hardly vary"
            )
    _fit_into(free, len({run.configuration for run in runs}), notes)
    name = "joint_dsmoe" if dsmoe else "joint" if joint else "chinchilla"
    return Structure(
        name,
        tuple(entry for entry in NAMES if entry in free),
        dsmoe_form if dsmoe else None,
        tuple(notes),
        has_size,
        has_tokens,
    )


def _expert_terms(
    runs: Sequence[Run], experts: Sequence[float], has_size: bool, has_tokens: bool
) -> tuple[set[str], list[str]]:
    free: set[str] = set()
    notes = []
    if len(experts) == 1:
        held = (
            "delta, gamma, omega and zeta are not identified and fixed at 0, e_start and e_max as published"
        )
        return free, [f"all runs have E = {experts[0]:g}: {held}"]
    by_experts = [[run for run in runs if run.kind != "dsmoe" and run.num_experts == e] for e in experts]
    for present, main, interaction, values in (
        (has_size, "delta", "gamma", [[run.num_params_active for run in some] for some in by_experts]),
        (has_tokens, "omega", "zeta", [[run.tokens for run in some] for some in by_experts]),
    ):
        if present:
            free.add(main)
            if sum(_distinct(some) > 1 for some in values if some) > 1:
                free.add(interaction)
            else:
                notes.append(
                    f"{interaction} is not identified (one E alone has several values) and fixed at 0"
                )
    if len(experts) > 2:
        free.add("start")
    if len(experts) > 3:
        free.add("saturation")
    fixed = [name for name, param in (("e_start", "start"), ("e_max", "saturation")) if param not in free]
    if fixed:
        notes.append(
            f"E is {_listed(experts)}: {' and '.join(fixed)} not identified, fixed at the published value"
        )
    return free, notes


def _fit_into(free: set[str], configurations: int, notes: list[str]) -> None:
    """Drop the least determined parameters where there are fewer distinct runs than parameters."""
    for name, shown in (("saturation", "e_max"), ("start", "e_start"), ("zeta", "zeta"), ("gamma", "gamma")):
        if len(free) < configurations:
            return
        if name in free:
            free.discard(name)
            notes.append(f"{shown} is fixed: {configurations} distinct runs are too few to fit it as well")
    if len(free) >= configurations:
        raise UserError(
            f"{configurations} distinct runs can't determine {len(free)} coefficients "
            f"({', '.join(entry for entry in NAMES if entry in free)}); give at least {len(free) + 1}"
        )


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
