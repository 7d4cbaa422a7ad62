"""The law that a plan uses: published, or fitted on own runs by `dsmoe fit` and read from its JSON file."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.planner.laws import (
    COEFFICIENTS,
    PUBLISHED_JOINT,
    PUBLISHED_RANGE,
    PUBLISHED_RMSE,
    PUBLISHED_TABULATED,
    TIE_BAND,
    DSMoETerm,
    JointLaw,
    ReducedLaw,
    TabulatedLaw,
    tie_band,
)
from dsmoe.planner.optimum import SizedLoss
from dsmoe.planner.shapes import LAW_VOCAB_SIZE, Family

Z90 = 1.64  # half-width of a 90% interval of a normal error in standard deviations
SHARE_SLACK = 1.2  # a run's active share is measured, and never exactly what was wanted
CHINCHILLA = ("a", "alpha", "b", "beta", "c")
FORMS = ("joint", "chinchilla", "joint_dsmoe")


@dataclass(frozen=True)
class Draw:
    """One set of coefficients: those of the fit, or of one bootstrap resample.

    Args:
        law: of dense models and SMoE.
        term: eta of DS-MoE.
        kappa: where it was fitted in place of eta: eta = num_experts ** -kappa.
    """

    law: JointLaw | TabulatedLaw
    term: DSMoETerm = field(default_factory=DSMoETerm)
    kappa: float | None = None

    def eta(self, family: Family) -> float:
        """Share of its total size that a DS-MoE is worth in the dense law; 1 for other kinds."""
        if family.kind != "dsmoe":
            return 1.0
        return self.term.eta if self.kappa is None else family.num_experts**-self.kappa

    def sized_loss(self, family: Family) -> SizedLoss:
        """Loss of a family as a function of (trained parameters, tokens)."""
        if family.kind == "dsmoe":
            dense, eta = self.law.at(1), self.eta(family)
            return lambda num_params, tokens: dense.loss(eta * num_params, tokens)
        return self.law.at(family.num_experts).loss

    def law_params(self, family: Family, hidden_size: float) -> float:
        """Parameters at which the law is read: eta * N_total for a DS-MoE, N_act otherwise."""
        return family.num_params_trained(hidden_size) * self.eta(family)


@dataclass(frozen=True)
class PlanningLaw:
    """A law with what is known about its errors.

    Args:
        name: for the output.
        fit: the coefficients.
        rmse: of the fit on its runs, in nats.
        fitted_range: smallest and largest num_params_active, tokens_per_param and num_experts of the runs, and
            dsmoe_num_experts (and where known dsmoe_active_share) where there were DS-MoEs.
        draws: bootstrap resamples; none for published coefficients.
        vocab_size: of the runs; losses per token of another vocabulary are other losses. None: the law file doesn't say.
    """

    name: str
    fit: Draw
    rmse: float
    fitted_range: Mapping[str, Sequence[float]]
    draws: tuple[Draw, ...] = ()
    vocab_size: int | None = None

    @property
    def tie_band(self) -> float:
        """Differences up to this are ties: the law can't tell them apart."""
        return tie_band(self.rmse) if self.draws or self.rmse != PUBLISHED_RMSE else TIE_BAND

    @property
    def known_experts(self) -> tuple[int, ...] | None:
        """Numbers of experts that the law has an entry for; None: any."""
        return tuple(sorted(self.fit.law.table)) if isinstance(self.fit.law, TabulatedLaw) else None

    def interval(self, family: Family, num_params: float, tokens: float) -> list[float]:
        """90% interval of the loss: percentiles over the bootstrap draws, or the loss -+ 1.64 RMSE."""
        if not self.draws:
            loss = self.fit.sized_loss(family)(num_params, tokens)
            return [loss - Z90 * self.rmse, loss + Z90 * self.rmse]
        losses = sorted(draw.sized_loss(family)(num_params, tokens) for draw in self.draws)
        last = len(losses) - 1
        return [losses[round(0.05 * last)], losses[round(0.95 * last)]]

    def beyond_range(self, family: Family, hidden_size: float, tokens: float) -> list[str]:
        """What of a row lies outside the runs that the law was fitted to, in words; empty: nothing."""
        num_params = self.fit.law_params(family, hidden_size)
        values = {"num_params_active": num_params, "tokens_per_param": tokens / num_params}
        if family.kind != "dsmoe":
            values["num_experts"] = family.num_experts
        elif self.fit.term.fitted:  # an assumed eta has no runs behind it, and is marked as assumed
            values["dsmoe_num_experts"] = family.num_experts
            if "dsmoe_active_share" in self.fitted_range:  # older law files and those of tables don't know it
                values["dsmoe_active_share"] = family.active_share
        found = []
        for name, value in values.items():
            if name not in self.fitted_range:
                found.append(f"{name}: the law file does not say its range")
                continue
            low, high = self.fitted_range[name]
            slack = SHARE_SLACK if name == "dsmoe_active_share" else 1 + 1e-9
            if not low / slack <= value <= high * slack:
                found.append(f"{name} {value:.4g} outside {low:.4g} to {high:.4g}")
        return found

    def with_eta(self, eta: float) -> "PlanningLaw":
        """The same law with an assumed eta."""
        return replace(
            self,
            fit=replace(self.fit, term=DSMoETerm(eta), kappa=None),
            draws=tuple(replace(draw, term=DSMoETerm(eta), kappa=None) for draw in self.draws),
        )


def published(tabulated: bool = False) -> PlanningLaw:
    """The published coefficients: table 3 (any number of experts) or table 4 (1, 2, 4, 8, 16, 32)."""
    law: JointLaw | TabulatedLaw = PUBLISHED_TABULATED if tabulated else PUBLISHED_JOINT
    name = f"published, arXiv 2502.05172 table {4 if tabulated else 3}"
    return PlanningLaw(name, Draw(law), PUBLISHED_RMSE, PUBLISHED_RANGE, vocab_size=LAW_VOCAB_SIZE)


def read_law(source: str | Path | None) -> PlanningLaw:
    """The law of `--law`: "joint" (or nothing), "tabulated", or a file written by `dsmoe fit --output`.

    Raises:
        UserError: an unreadable or incomplete file; the message names the field.
    """
    if source is None or str(source) in ("joint", "tabulated"):
        return published(str(source) == "tabulated")
    content = read_json(source)
    if not isinstance(content, Mapping) or content.get("law") not in FORMS:
        found = content.get("law") if isinstance(content, Mapping) else type(content).__name__
        raise UserError(f"{source}: law is {found!r}; a file of `dsmoe fit` has one of {', '.join(FORMS)}")
    form = content["law"]
    listed = content.get("coefficients")
    if not isinstance(listed, Mapping):
        raise UserError(
            f"{source}: coefficients is missing; a file of `dsmoe fit` maps names to values there"
        )
    values = {
        name: entry.get("value") if isinstance(entry, Mapping) else entry for name, entry in listed.items()
    }
    resampled = content.get("bootstrap") or []
    if not isinstance(resampled, list) or not all(isinstance(draw, Mapping) for draw in resampled):
        raise UserError(
            f"{source}: bootstrap must be a list of draws, each of which maps coefficients to values"
        )
    rmse = PUBLISHED_RMSE if content.get("rmse_train") is None else content["rmse_train"]
    if not _is_number(rmse) or rmse < 0:
        raise UserError(f"{source}: rmse_train is {rmse!r}; it must be a number of nats, at least 0")
    vocab_size = content.get("vocab_size")
    if vocab_size is not None and (type(vocab_size) is not int or vocab_size < 1):
        raise UserError(f"{source}: vocab_size is {vocab_size!r}; it must be a whole number of at least 1")
    return PlanningLaw(
        name=f"{Path(source).name} ({form})",
        fit=_draw(form, values, f"{source}: coefficients"),
        rmse=float(rmse),
        fitted_range=_ranges(content.get("range"), source),
        draws=tuple(
            _draw(form, {**values, **draw}, f"{source}: bootstrap[{index}]")
            for index, draw in enumerate(resampled)
        ),
        vocab_size=vocab_size,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ranges(found: Any, source: str | Path) -> Mapping[str, Sequence[float]]:
    ranges = {} if found is None else found
    if not isinstance(ranges, Mapping):
        raise UserError(f"{source}: range is {ranges!r}; it must map names to [smallest, largest]")
    for name, ends in ranges.items():
        if (
            not isinstance(ends, list)
            or len(ends) != 2
            or not all(map(_is_number, ends))
            or ends[0] > ends[1]
        ):
            raise UserError(f"{source}: range.{name} is {ends!r}; it must be [smallest, largest]")
    return ranges


def _draw(form: str, values: Mapping[str, Any], where: str) -> Draw:
    reduced = form == "chinchilla" and not all(name in values for name in COEFFICIENTS)
    names = CHINCHILLA if reduced else COEFFICIENTS
    numbers = {}
    for name in names:
        if not _is_number(values.get(name)):
            raise UserError(f"{where}.{name} is {values.get(name)!r}; it must be a finite number")
        numbers[name] = float(values[name])
    if not reduced and not 0 < numbers["e_start"] < numbers["e_max"]:
        raise UserError(
            f"{where}: e_start is {numbers['e_start']:g} and e_max {numbers['e_max']:g}; e_start must be above 0 and "
            "below e_max"
        )
    law: JointLaw | TabulatedLaw
    if form == "chinchilla":
        five = ReducedLaw(*(numbers[name] for name in CHINCHILLA))
        law = TabulatedLaw({1: five if reduced else JointLaw(**numbers).at(1)})
    else:
        law = JointLaw(**numbers)
    dense = law.at(1)
    if not (dense.mu < 0 and dense.nu < 0 and dense.m > 0 and dense.n > 0):
        raise UserError(
            f"{where}: this law's loss does not fall with both size and tokens (exponents {dense.mu:.4g} and "
            f"{dense.nu:.4g}, factors {dense.m:.4g} and {dense.n:.4g}); no plan can be made with it"
        )
    eta, kappa = values.get("eta"), values.get("kappa")
    if eta is not None and not (_is_number(eta) and eta > 0):
        raise UserError(f"{where}.eta is {eta!r}; it must be a number above 0")
    if kappa is not None and not _is_number(kappa):
        raise UserError(f"{where}.kappa is {kappa!r}; it must be a finite number")
    fitted = eta is not None or kappa is not None
    return Draw(
        law, DSMoETerm(1.0 if eta is None else float(eta), fitted), None if kappa is None else float(kappa)
    )
