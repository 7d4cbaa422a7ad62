"""Joint laws of the routed models of arXiv 2202.01169, fitted without the largest ones, and their record."""

import argparse
import sys
import tempfile
from pathlib import Path

from dsmoe.errors import run_reporting_errors
from dsmoe.files import sha256, write_json
from dsmoe.planner.fit.plots import residual_plot
from dsmoe.planner.fit.routed import ROUTERS, coefficient_table, fit_router, summary_table
from dsmoe.records import add_record_arguments, check_outputs, write_concluded_record

RECORD = Path(__file__).resolve().parent / "records" / "scaling-routed"
SOURCE = (
    "github.com/google-deepmind/scaling_laws_for_routing, data/curves.csv.gz, CC BY 4.0 (arXiv 2202.01169)"
)
EXAMPLES = """examples:
  python eval/fit_routed.py --data routed_lm_curves.csv.gz --overwrite
  python eval/fit_routed.py --data curves.csv.gz --output my-record --conclusion conclusion.md
"""


def run(args: argparse.Namespace) -> None:
    """Fit each router, print the tables, write the record."""
    check_outputs(record=args.output, overwrite=args.overwrite, conclusion=args.conclusion)
    results, plots = {}, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for router in ROUTERS:
            fit, results[router] = fit_router(args.data, router, args.bootstrap)
            plots.append(folder / f"residuals_{router.lower()}.png")
            residual_plot(
                fit, plots[-1], f"{router} and dense, final losses; held out: 1.3B active parameters"
            )
        write_json(folder / "results.json", results)
        tables = f"{summary_table(results)}\n\n{coefficient_table(results)}"
        print(tables)
        write_concluded_record(
            args.output,
            given=args.conclusion,
            tables=tables,
            title="Joint scaling laws of routed language models, fitted without the largest ones",
            command="python eval/fit_routed.py --data routed_lm_curves.csv.gz --overwrite",
            files=[folder / "results.json", *plots],
            details={"data": {"source": SOURCE, "sha256": sha256(args.data)}, "bootstrap": args.bootstrap},
            overwrite=args.overwrite,
        )


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data", type=Path, required=True, metavar="CSV", help=f"curves.csv.gz of {SOURCE.split(',')[0]}"
    )
    add_record_arguments(parser, "--output", RECORD)
    parser.add_argument(
        "--bootstrap", type=int, default=200, metavar="B", help="refits (default: %(default)s)"
    )
    args = parser.parse_args()
    return run_reporting_errors(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
