"""The console command `dsmoe`: one subcommand per entry of `COMMANDS`.

A command module has `add_parser(subparsers)`, which adds its parser and sets `run=function(args)` as a default. Only the
module of the subcommand that was asked for is imported: `dsmoe plan` must not wait for torch.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from dsmoe import __version__
from dsmoe.errors import run_reporting_errors


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives.

    Args:
        module: the module with `add_parser`.
        summary: its line in `dsmoe --help`.
        loads_models: whether transformers must know the architecture.
    """

    module: str
    summary: str
    loads_models: bool = False


COMMANDS = {
    "data": Command("dsmoe.data.command", "prepare and verify token folders, fetch text and benchmarks"),
    "plan": Command("dsmoe.planner.command", "say which model to train under a memory and a compute budget"),
    "fit": Command("dsmoe.planner.fit.command", "fit a scaling law to measured runs"),
    "split": Command(
        "dsmoe.convert.command", "cut a dense checkpoint into experts, as the start of a DS-MoE", True
    ),
    "sparsify": Command("dsmoe.sparsify.command", "give a checkpoint a sparse routing policy", True),
    "polish": Command(
        "dsmoe.sparsify.polish", "fine-tune a run shortly with the policies of sparse checkpoints", True
    ),
    "export": Command("dsmoe.export.command", "write a checkpoint for stock architectures", True),
    "serve": Command("dsmoe.serving.command", "serve a checkpoint by an OpenAI-compatible endpoint", True),
}


def build_parser(asked: str | None) -> argparse.ArgumentParser:
    """The parser, complete for the subcommand `asked` and with one line for each of the others."""
    parser = argparse.ArgumentParser(
        prog="dsmoe", description="The console command `dsmoe`.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name == asked:
            importlib.import_module(command.module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, with one line on stderr)."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = next((word for word in words if not word.startswith("-")), None)
    args = build_parser(asked).parse_args(words)
    if COMMANDS[asked or ""].loads_models:
        importlib.import_module("dsmoe.model.auto").register()
    return run_reporting_errors(lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
