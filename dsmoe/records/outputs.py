"""Where results go: places are tried before what takes long, and results are printed before files are written."""

import json as json_format
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe.figures import check_figure
from dsmoe.files import check_new_file, write_json
from dsmoe.records.record import check_record_folder, read_conclusion


def check_outputs(
    *,
    record: Path | None = None,
    overwrite: bool = False,
    conclusion: Path | None = None,
    json: str | None = None,
    plot: Path | None = None,
) -> None:
    """Refuse outputs that can't be written; for commands that work long before they write them.

    Args:
        record: folder of the record; None: none is written.
        overwrite: an existing record may be replaced.
        conclusion: text file to put into the record; without a record it isn't read.
        json: file of the results; None or "-": none is written.
        plot: PNG file; None: none is drawn.

    Raises:
        UserError: as `check_record_folder`, `read_conclusion`, `check_new_file` and `check_figure`.
    """
    if record:
        check_record_folder(record, overwrite=overwrite)
        read_conclusion(record, conclusion)
    if json and json != "-":
        check_new_file(json, "--json")
    if plot:
        check_figure(plot, "--plot")
        check_new_file(plot, "--plot")


def give_results(results: Any, report: str, json: str | None, write: Callable[[], Any]) -> None:
    """Print results, then write them: what took long is on the screen when a file can't be written after all.

    Args:
        results: JSON-able.
        report: the same for people.
        json: file to write the results to; "-" prints them instead of the report; None: only the report.
        write: writes everything else.
    """
    try:
        print(json_format.dumps(results, indent=2) if json == "-" else report)
    finally:
        # also where printing failed: the reader of a pipe (`| head`) had seen enough
        if json and json != "-":
            write_json(json, results)
        write()
