"""Records: what was measured, with all that is needed to measure it again."""

from dsmoe.records.outputs import check_outputs, give_results
from dsmoe.records.record import (
    add_record_arguments,
    check_record_folder,
    write_concluded_record,
    write_record,
)

__all__ = [
    "add_record_arguments",
    "check_outputs",
    "check_record_folder",
    "give_results",
    "write_concluded_record",
    "write_record",
]
