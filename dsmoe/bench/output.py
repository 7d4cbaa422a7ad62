"""What the benchmark commands have in common: their output options, progress, and where the results go."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dsmoe.bench.timing import usable_cores
from dsmoe.errors import UserError
from dsmoe.files import read_json, write_json
from dsmoe.records import check_outputs, give_results, write_record

Advance = Callable[[str], Any]
Results = dict[str, Any]
_NOT_OURS = "not what --json of this benchmark has written"


def benchmark_parser(script: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; one that is added again takes the place of the first.

    Args:
        script: file name under eval/.
        description: what is measured.
        epilog: examples.
    """
    parser = argparse.ArgumentParser(
        prog=f"python eval/{script}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        conflict_handler="resolve",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="also write the results as JSON; - prints JSON instead of the table"
    )
    parser.add_argument("--record", type=Path, metavar="DIR", help="also write a record")
    parser.add_argument("--note", default="", metavar="TEXT", help="text to put above the record's tables")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing record")
    parser.add_argument(
        "--results", type=Path, nargs="+", metavar="FILE",
        help="don't measure: take what earlier --json wrote (rows of several, such as one for each number of threads, "
        "are joined)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=int, nargs="+", default=list(range(1, min(2, usable_cores()) + 1)), metavar="N",
        help="numbers of threads, measured one after the other (default: 1 and, with two cores, 2)",
    )  # fmt: skip
    return parser


def add_plan_arguments(parser: argparse.ArgumentParser, default_rounds: str) -> None:
    """Add --rounds and --quick: how much is measured.

    Args:
        parser: of `benchmark_parser`.
        default_rounds: what --rounds is otherwise, in words.
    """
    parser.add_argument(
        "--rounds", type=int, metavar="R", help=f"timed rounds of each case (default: {default_rounds})"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes and few rounds, to see that it works"
    )


def checked_rounds(args: argparse.Namespace) -> int | None:
    """--rounds, or None where it isn't given; raises UserError on less than 1."""
    if args.rounds is not None and args.rounds < 1:
        raise UserError(f"--rounds is {args.rounds}; it must be at least 1")
    return args.rounds


def results_of(args: argparse.Namespace, measure: Callable[[Advance], Results]) -> Results:
    """Measured with a progress bar, or read with `--results`.

    Args:
        args: of `benchmark_parser`.
        measure: given what to call with the name of the case after each timed step.

    Raises:
        UserError: an output can't be written, or the file can't be read; before anything is measured.
    """
    check_outputs(
        record=args.record, overwrite=args.overwrite, json=args.json, plot=getattr(args, "plot", None)
    )
    if args.results is not None:
        parts = [read_json(path) for path in args.results]
        for path, part in zip(args.results, parts):
            if not isinstance(part, dict):
                raise UserError(f"--results {path}: {_NOT_OURS}")
        return joined(parts)
    # no total: implementations that don't run here, and slow ones, take fewer steps
    with tqdm(unit=" steps", disable=None, file=sys.stderr) as bar:

        def advance(case: str) -> None:
            bar.set_description(case, refresh=False)
            bar.update()

        return measure(advance)


@contextmanager
def reading(args: argparse.Namespace) -> Iterator[None]:
    """Around what makes a table or plot of results: those of `--results` may be of anything.

    Args:
        args: of `benchmark_parser`.

    Raises:
        UserError: an entry of results that were read is missing or of another type.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        if args.results is None or isinstance(error, UserError):
            raise
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise UserError(f"--results {' '.join(map(str, args.results))}: {_NOT_OURS} ({reason})") from None


def joined(parts: Sequence[Results]) -> Results:
    """Results of several runs as one: their rows one after the other, everything else from the first.

    Args:
        parts: as written by `--json`.
    """
    made = dict(parts[0])
    for name in made:
        # a part that was left out, such as the whole model, is None
        values = [part[name] for part in parts if part.get(name) is not None]
        if not values:
            continue
        made[name] = value = values[0]
        alike = [other for other in values if isinstance(other, type(value))]
        if isinstance(value, list):
            made[name] = [row for one in alike for row in one]
        elif name == "model" and isinstance(value, dict) and len(alike) > 1:
            made[name] = joined(alike)
    return made


def command_for_threads(args: argparse.Namespace, script: str, results: Results) -> str:
    """The command that makes a record again, for every number of threads in it."""
    rows = [*results["layers"], *((results.get("model") or {}).get("rows") or [])]
    words = ["--threads", *map(str, sorted({row["threads"] for row in rows}))]
    if getattr(args, "only", None):
        words += ["--only", *args.only]
    if getattr(args, "rounds", None) is not None:
        words += ["--rounds", str(args.rounds)]
    if getattr(args, "quick", False):
        words.append("--quick")
    return f"python eval/{script} {' '.join(words)} --record {args.record} --overwrite"


def give(
    args: argparse.Namespace,
    results: Results,
    table: str,
    title: str,
    command: str,
    plots: dict[str, Callable[[Path], Any]] | None = None,
) -> None:
    """Print, then write JSON, plot and record where asked for.

    Args:
        args: of `benchmark_parser`.
        results: of `results_of`.
        table: for people.
        title: of the record.
        command: that makes the record again.
        plots: by file name, what draws them for the record; `--plot`, where there is such an option, is the first.

    Raises:
        UserError: a file can't be written, or as `reading`.
    """

    def write() -> None:
        if getattr(args, "plot", None):
            with reading(args):
                next(iter((plots or {}).values()))(args.plot)
        if args.record:
            _write_record(args, results, table, title, command, plots or {})

    give_results(results, table, args.json, write)


def _write_record(
    args: argparse.Namespace,
    results: Results,
    table: str,
    title: str,
    command: str,
    plots: dict[str, Callable[[Path], Any]],
) -> None:
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "results.json", *(Path(name) / plot for plot in plots)]
        write_json(files[0], results)
        with reading(args):
            for file, draw in zip(files[1:], plots.values()):
                draw(file)
        write_record(
            args.record, title=title, command=command,
            conclusion=f"{args.note}\n\n{table}".strip(), files=files, overwrite=args.overwrite,
            details={"measured_on": {key: results.get(key) for key in ("versions", "hardware")}},
        )  # fmt: skip
