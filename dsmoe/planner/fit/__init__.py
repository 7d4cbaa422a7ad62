"""Fitting the laws of `dsmoe.planner.laws` to measured runs: `dsmoe fit`. Imports neither torch nor transformers."""

from dsmoe.planner.fit.fitting import LawFit, fit_law
from dsmoe.planner.fit.runs import Run

__all__ = ["LawFit", "Run", "fit_law"]
