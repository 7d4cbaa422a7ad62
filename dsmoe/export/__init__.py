"""Exports: a sparsified checkpoint as an architecture that transformers ships, checked against the original."""

from dsmoe.export.requirements import FORMATS
from dsmoe.export.write import export

__all__ = ["FORMATS", "export"]
