"""Records: what was measured, with all that is needed to measure it again."""

from dsmoe.records.record import write_record

__all__ = ["write_record"]
