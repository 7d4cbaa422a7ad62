"""The whole fit: form, minimum, identification, bootstrap, held-out error."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dsmoe.errors import UserError
from dsmoe.planner.fit.bootstrap import METHODS, bootstrap, interval
from dsmoe.planner.fit.coefficients import coefficients, joint_law
from dsmoe.planner.fit.forms import INDEX, WALL, Array, Design, make_design, predict
from dsmoe.planner.fit.identification import Profile, profiles
from dsmoe.planner.fit.objective import HUBER_DELTA, Objective
from dsmoe.planner.fit.runs import Run, groups
from dsmoe.planner.fit.solve import Solution, multi_start
from dsmoe.planner.fit.structure import DSMOE_FORMS, Structure, choose_structure
from dsmoe.planner.laws import JointLaw

WEIGHTINGS = ("none", "loss")
HOLD_OUT_BY = ("num_params_total", "flops")


@dataclass(frozen=True)
class Settings:
    """How to fit.

    Args:
        law: "chinchilla" or "joint"; None: joint where there are SMoEs.
        dsmoe_form: "eta" or "kappa"; None: by BIC.
        draws: bootstrap refits; 0: none.
        seed: of the draws.
        method: "residuals" or "runs" (see `dsmoe.planner.fit.bootstrap`).
        weighting: "loss" underweights runs in proportion to their loss.
        hold_out: share of the runs, the largest, that a first fit does without; 0: none.
        hold_out_by: what "largest" means.
        huber_delta: in ln loss.
        objective_scale: factor on the objective; changes nothing (and a test says so).
    """

    law: str | None = None
    dsmoe_form: str | None = None
    draws: int = 200
    seed: int = 0
    method: str = "residuals"
    weighting: str = "none"
    hold_out: float = 0.15
    hold_out_by: str = "num_params_total"
    huber_delta: float = HUBER_DELTA
    objective_scale: float = 1.0

    def check(self) -> None:
        """Raise UserError on values that can't work, naming the option."""
        for name, value, known in (
            ("bootstrap-method", self.method, METHODS),
            ("weighting", self.weighting, WEIGHTINGS),
            ("hold-out-by", self.hold_out_by, HOLD_OUT_BY),
        ):
            if value not in known:
                raise UserError(f"--{name} is {value!r}; it must be one of {', '.join(known)}")
        if not 0 <= self.hold_out < 1:
            raise UserError(f"--hold-out-largest is {self.hold_out}; it must be a share from 0 up to 1")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}; it must be a whole number of at least 0")
        if self.draws < 0:
            raise UserError(f"--bootstrap is {self.draws}; it must be a number of draws, or 0 for none")
        if not self.huber_delta > 0 or not self.objective_scale > 0:
            raise UserError(f"huber_delta {self.huber_delta} and objective_scale must be above 0")


@dataclass(frozen=True)
class LawFit:
    """A fitted law.

    Args:
        runs: those fitted, all of them.
        structure: the form.
        design: their arrays.
        theta: the minimum in centred parameters, [P].
        solution: of the solver.
        values: coefficients at full precision.
        draws: coefficients of the bootstrap, each [S]; empty without one.
        profiles: of the free coefficients.
        rmse_train: nats, over all runs.
        rmse_held_out: nats, over the largest runs, predicted by a fit without them; None without one.
        held_out: positions of those runs.
        held_out_predictions: their losses as predicted then.
        notes: what was fixed, assumed or not possible.
        bic: by form of the DS-MoE term, where there is one.
    """

    runs: tuple[Run, ...]
    structure: Structure
    design: Design
    theta: Array
    solution: Solution
    values: dict[str, float]
    draws: dict[str, Array]
    profiles: dict[str, Profile]
    rmse_train: float
    rmse_held_out: float | None = None
    held_out: tuple[int, ...] = ()
    held_out_predictions: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    bic: dict[str, float] = field(default_factory=dict)

    @property
    def law(self) -> JointLaw:
        """The fitted law as the planner takes it."""
        return joint_law(self.values)

    def identified(self, name: str) -> bool:
        """Whether the data determine a free coefficient: by its profile, and its bootstrap interval excludes zero."""
        profile = self.profiles.get(name)
        if profile is None or not profile.identified:
            return False
        between = interval(self.draws[name]) if name in self.draws else None
        return between is None or between[0] * between[1] > 0

    def predict(self, runs: Sequence[Run]) -> Array:
        """Losses in nats per token of these runs."""
        design = make_design(runs, self.structure.dsmoe_form, self.design.centre)
        return np.exp(predict(self.theta[None], design)[0][0])

    def eta(self, num_experts: float) -> tuple[Array, Array] | None:
        """eta of DS-MoEs with so many experts, in the fit [1] and in the draws [S]; None without a DS-MoE term."""
        form = self.structure.dsmoe_form
        if form is None:
            return None
        both = np.array([self.values[form]]), self.draws.get(form, np.array([]))
        return both if form == "eta" else (num_experts ** -both[0], num_experts ** -both[1])


def fit_law(runs: Sequence[Run], settings: Settings | None = None) -> LawFit:
    """Fit a law to runs.

    Args:
        runs: the runs.
        settings: how.

    Raises:
        UserError: the runs can't determine a law, or a setting is impossible.
    """
    settings = settings or Settings()
    settings.check()
    fit = _best_form(runs, settings)
    fit = _with_hold_out(fit, settings)
    if settings.draws:
        objective = _objective(fit.runs, fit.design, settings)
        drawn = bootstrap(
            objective,
            fit.theta,
            fit.structure,
            groups(fit.runs),
            settings.draws,
            settings.seed,
            settings.method,
        )
        fit = replace(fit, draws=coefficients(drawn.theta, fit.design, fit.structure))
    return replace(fit, notes=(*fit.notes, *_identification_notes(fit)))


def _objective(runs: Sequence[Run], design: Design, settings: Settings) -> Objective:
    loss = np.array([[run.loss for run in runs]])
    weights = np.full(loss.shape, settings.objective_scale)
    if settings.weighting == "loss":
        weights = weights * loss.mean() / loss
    return Objective(design, np.log(loss), weights, settings.huber_delta)


def _one_form(runs: Sequence[Run], settings: Settings, form: str) -> LawFit:
    structure = choose_structure(runs, settings.law, form)
    design = make_design(runs, structure.dsmoe_form)
    objective = _objective(runs, design, settings)
    solution = multi_start(objective, structure)
    theta = solution.theta[0]
    values = {name: float(found[0]) for name, found in coefficients(theta[None], design, structure).items()}
    residual = np.exp(predict(theta[None], design)[0][0]) - [run.loss for run in runs]
    notes = list(structure.notes)
    if "saturation" in structure.free and theta[INDEX["saturation"]] >= WALL:
        notes.append("e_max ran to its bound: the data show no saturation with the number of experts")
    if not solution.converged.all():
        notes.append("the optimiser did not reach full precision: the data leave a direction nearly free")
    return LawFit(tuple(runs), structure, design, theta, solution, values, {}, profiles(objective, theta, structure),
                  float(np.sqrt(np.mean(residual**2))), notes=tuple(notes))  # fmt: skip


def _best_form(runs: Sequence[Run], settings: Settings) -> LawFit:
    """The fit with the DS-MoE form that was asked for, or the one with the lower BIC."""
    several = len({run.num_experts for run in runs if run.kind == "dsmoe"}) > 1
    if settings.dsmoe_form is not None and not any(run.kind == "dsmoe" for run in runs):
        known = ", ".join(sorted({run.kind for run in runs}))
        raise UserError(
            f"--dsmoe-form {settings.dsmoe_form}: no run is a DS-MoE, their kinds are {known}; leave it out, or say "
            "which are in a column kind (dsmoe)"
        )
    if settings.dsmoe_form is not None or not any(run.kind == "dsmoe" for run in runs):
        return _one_form(runs, settings, settings.dsmoe_form or "eta")
    forms = DSMOE_FORMS if several else ("eta",)
    fits = {form: _one_form(runs, settings, form) for form in forms}
    bic = {form: _bic(fit) for form, fit in fits.items()}
    best = min(fits, key=lambda form: bic[form])
    if not several:
        note = "all DS-MoEs have the same number of experts: how eta depends on it is not identified"
    else:
        note = f"DS-MoE form chosen by BIC ({', '.join(f'{form} {bic[form]:.1f}' for form in forms)})"
        if max(bic.values()) - min(bic.values()) < 2:
            note += ": the data do not tell them apart"
    return replace(fits[best], bic=bic, notes=(*fits[best].notes, note))


def _bic(fit: LawFit) -> float:
    runs = len(fit.runs)
    log_residual = np.log(fit.predict(fit.runs) / [run.loss for run in fit.runs])
    variance = max(float(np.mean(log_residual**2)), 1e-24)
    return runs * float(np.log(variance)) + len(fit.structure.free) * float(np.log(runs))


def _with_hold_out(fit: LawFit, settings: Settings) -> LawFit:
    """Fit again without the largest runs, and predict them."""
    count = int(np.ceil(settings.hold_out * len(fit.runs))) if settings.hold_out else 0
    if not count:
        return fit
    sizes = [
        run.num_params_total if settings.hold_out_by == "num_params_total" else run.training_flops
        for run in fit.runs
    ]
    # runs as large as the smallest held-out one go with it, so that no seed of a configuration stays behind
    limit = sorted(sizes)[-count] * (1 - 1e-9)
    out = [index for index, size in enumerate(sizes) if size >= limit]
    kept = [run for index, run in enumerate(fit.runs) if index not in set(out)]
    try:
        if not kept:
            raise UserError("all runs are equally large")
        form = fit.structure.dsmoe_form or "eta"
        first = _one_form(kept, settings, form)
        if len(first.structure.free) < len(fit.structure.free) - 2:
            raise UserError("the rest determines far fewer coefficients")
        missing = {run.kind for run in fit.runs} - {run.kind for run in kept}
        if missing:
            raise UserError(f"no {' or '.join(sorted(missing))} run would be left")
    except UserError as error:
        return replace(
            fit, notes=(*fit.notes, f"no held-out error: without the {len(out)} largest runs, {error}")
        )
    held = [fit.runs[index] for index in out]
    predicted = first.predict(held)
    rmse = float(np.sqrt(np.mean((predicted - [run.loss for run in held]) ** 2)))
    note = (
        f"held-out error: the {len(out)} largest runs by {settings.hold_out_by}, predicted by a fit of the other "
        f"{len(kept)}; the coefficients are those of a fit to all {len(fit.runs)}"
    )
    return replace(fit, rmse_held_out=rmse, held_out=tuple(out), held_out_predictions=tuple(map(float, predicted)),
                   notes=(*fit.notes, note))  # fmt: skip


def _identification_notes(fit: LawFit) -> list[str]:
    loose = [name for name in fit.profiles if not fit.identified(name)]
    if not loose:
        return []
    said = [
        f"not identified: {', '.join(loose)}: doubled, or halved or set to zero, and the others fitted again, the fit "
        "gets worse by less than the noise or by under 0.0005 nats, or the 90% interval holds 0; read predictions in "
        "range, not these values"
    ]
    if "e_max" in loose and fit.draws:
        said.append("the interval of e_max is where the optimiser stays, not what the data say")
    return said
