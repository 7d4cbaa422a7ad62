"""Dense checkpoints as the start of a DS-MoE: their MLPs cut into experts that add up to the same function."""

from dsmoe.convert.assignment import ASSIGNMENTS, assign_units
from dsmoe.convert.split import split_dense

__all__ = ["ASSIGNMENTS", "assign_units", "split_dense"]
