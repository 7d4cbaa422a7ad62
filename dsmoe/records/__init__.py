"""Records: what was measured, with all that is needed to measure it again."""

from dsmoe.records.record import conclusion_for, write_record

__all__ = ["conclusion_for", "write_record"]
