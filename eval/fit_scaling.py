"""The joint law with a DS-MoE term, fitted to a study's runs, and its record."""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

from dsmoe.errors import run_reporting_errors
from dsmoe.files import sha256, write_json
from dsmoe.planner.fit.command import read_sources
from dsmoe.planner.fit.fitting import Settings, fit_law
from dsmoe.planner.fit.plots import residual_plot
from dsmoe.planner.fit.report import as_json, human_report
from dsmoe.records import add_record_arguments, check_outputs, write_concluded_record

RECORDS = Path("eval/records")
TITLE = "A joint scaling law measured on dense, SMoE and DS-MoE models"
BOOTSTRAP = 200
EXAMPLES = """examples:
  python eval/fit_scaling.py --overwrite
  python eval/fit_scaling.py --runs runs/my-study --output my-record --title "My law" --conclusion conclusion.md
"""


def run(args: argparse.Namespace) -> None:
    """Fit, print, write the record."""
    check_outputs(record=args.output, overwrite=args.overwrite, conclusion=args.conclusion)
    runs, notes = read_sources([args.runs])
    fit = fit_law(runs, Settings(draws=args.bootstrap))
    content = as_json(fit, [])
    content["notes"] += notes
    report = human_report(content)
    print(report)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "law.json", content)
        residual_plot(fit, folder / "residuals.png", "Residuals of the fitted law")
        command = f"python eval/fit_scaling.py --runs {args.runs} --output {args.output} --overwrite"
        if args.title != TITLE:
            command += f" --title {shlex.quote(args.title)}"
        if args.bootstrap != BOOTSTRAP:
            command += f" --bootstrap {args.bootstrap}"
        write_concluded_record(
            args.output,
            given=args.conclusion,
            tables=report,
            title=args.title,
            command=command,
            files=[folder / "law.json", folder / "residuals.png"],
            details={
                "runs_sha256": sha256(args.runs) if args.runs.is_file() else None,
                "bootstrap": args.bootstrap,
            },
            overwrite=args.overwrite,
        )
    print(f"written to {args.output}")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--runs", type=Path, default=RECORDS / "scaling-sweep" / "results.json", metavar="PATH",
        help="results.json of a study, folder of runs, or CSV (default: %(default)s)",
    )  # fmt: skip
    add_record_arguments(parser, "--output", RECORDS / "scaling-law")
    parser.add_argument(
        "--title",
        default=TITLE,
        help="of the record",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=BOOTSTRAP, metavar="B", help="refits (default: %(default)s)"
    )
    args = parser.parse_args()
    return run_reporting_errors(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
