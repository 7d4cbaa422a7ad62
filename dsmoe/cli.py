"""The console command `dsmoe`: one subcommand per module listed in `COMMANDS`.

A command module has `add_parser(subparsers)`, which adds its parser and sets `run=function(args)` as a default.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from dsmoe import __version__
from dsmoe.errors import run_reporting_errors

COMMANDS = ("dsmoe.data.command", "dsmoe.sparsify.command", "dsmoe.export.command")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, with one line on stderr)."""
    parser = argparse.ArgumentParser(prog="dsmoe", description=__doc__.split(":")[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        importlib.import_module(module).add_parser(subparsers)
    args = parser.parse_args(argv)
    return run_reporting_errors(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
