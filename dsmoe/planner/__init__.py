"""Which model to train: the joint scaling law of dense models and SMoE, and DS-MoE beside it, under real limits.

Nothing here imports torch or transformers; matplotlib is loaded only to draw. `dsmoe plan` is `planner.command`.
"""

from dsmoe.planner.laws import PUBLISHED_JOINT, PUBLISHED_TABULATED, JointLaw, ReducedLaw, TabulatedLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.plan import Plan, candidate_families, make_plan
from dsmoe.planner.shapes import Family

__all__ = [
    "PUBLISHED_JOINT",
    "PUBLISHED_TABULATED",
    "Family",
    "JointLaw",
    "Limits",
    "Plan",
    "ReducedLaw",
    "TabulatedLaw",
    "candidate_families",
    "make_plan",
]
