"""`dsmoe fit`: fit a scaling law to measured runs."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.errors import UserError
from dsmoe.figures import check_figure
from dsmoe.files import check_new_file, write_json
from dsmoe.planner.fit.bootstrap import METHODS
from dsmoe.planner.fit.fitting import HOLD_OUT_BY, WEIGHTINGS, Settings, fit_law
from dsmoe.planner.fit.folders import read_folder, read_study
from dsmoe.planner.fit.report import as_json, human_report
from dsmoe.planner.fit.runs import Run, check_one_text
from dsmoe.planner.fit.structure import DSMOE_FORMS
from dsmoe.planner.fit.tables import FIELDS, read_table

EPILOG = """examples:
  dsmoe fit runs/sweep                                    all finished runs in a folder, at any depth
  dsmoe fit runs/* --output law.json --plot residuals.png
  dsmoe fit eval/records/scaling-sweep/results.json       the runs of a study
  dsmoe plan --flops 1e19 --law law.json                  plan with it
  dsmoe fit runs.csv --json -                             columns kind, num_experts, num_params_active,
                                                          num_params_total, tokens, loss (name and seed if there)
  dsmoe fit curves.csv.gz --map loss=loss_validation --map num_params_total=total_parameter_count \\
      --map num_params_active=dense_parameter_count --map "tokens=step*524288" --where router_type=Dense,S-Base \\
      --where k=1 --where flop_increase=1.0 --where routing_frequency=0.5 --where step=248000,249000,250000 \\
      --last-of hyper_id --skip-empty
  dsmoe fit runs.csv --law joint --decide-flops 1e18 1e19 --bootstrap 500

Laws: chinchilla a N^alpha + b D^beta + c (dense runs); joint, the same with a, alpha, b and beta depending on the number
of experts (arXiv 2502.05172, eq. 4); joint_dsmoe, in which a DS-MoE has the loss of a dense model of eta times its total
size. "identified" says whether the data determine a coefficient; where E stays below 32 or so, e_max is not."""


def add_parser(subparsers: Any) -> None:
    """Add `fit` to the command line."""
    parser = subparsers.add_parser(
        "fit", help="fit a scaling law to measured runs", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument(
        "sources",
        nargs="+",
        type=Path,
        help="folders of finished runs, results.json of studies, and CSV files (also .gz)",
    )
    table = parser.add_argument_group("reading CSV files")
    table.add_argument(
        "--map", action="append", default=[], metavar="FIELD=COLUMN",
        help=f"column, number or sum of products of those for a field ({', '.join(FIELDS)}); repeat it",
    )  # fmt: skip
    table.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE[,VALUE]",
                       help="read only rows with one of these values; repeat it")  # fmt: skip
    table.add_argument("--last-of", metavar="COLUMN", help="of each value keep the row with most tokens")
    table.add_argument("--skip-empty", action="store_true", help="leave out rows without a loss")
    form = parser.add_argument_group("the fit")
    form.add_argument("--law", choices=("chinchilla", "joint"), help="default: joint where there are SMoEs")
    form.add_argument("--dsmoe-form", choices=DSMOE_FORMS,
                      help="loss = dense(eta * N_total), or eta = num_experts**-kappa (default: by BIC)")  # fmt: skip
    form.add_argument("--weighting", choices=WEIGHTINGS, default="none",
                      help="loss: a run weighs less in proportion to its loss (default: %(default)s)")  # fmt: skip
    form.add_argument("--hold-out-largest", type=float, default=0.15, metavar="SHARE",
                      help="share of the runs that a first fit predicts (default: %(default)s; 0: none)")  # fmt: skip
    form.add_argument(
        "--hold-out-by", choices=HOLD_OUT_BY, default=HOLD_OUT_BY[0], help="default: %(default)s"
    )
    form.add_argument("--bootstrap", type=int, default=200, metavar="B", help="refits (default: %(default)s)")
    form.add_argument("--bootstrap-method", choices=METHODS, default=METHODS[0], help="default: %(default)s")
    form.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    form.add_argument("--decide-flops", type=float, nargs="+", default=[], metavar="F",
                      help="budgets to decide on (default: the largest among the runs, and ten times that)")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=Path, metavar="LAW.json", help="write the law for `dsmoe plan --law`"
    )
    output.add_argument(
        "--json", metavar="PATH", help="also write the result as JSON; - prints it instead of text"
    )
    output.add_argument("--plot", type=Path, metavar="PNG", help="residual plot")
    parser.set_defaults(run=run)


def read_sources(
    sources: Sequence[Path],
    mapping: Sequence[str] = (),
    where: Sequence[str] = (),
    last_of: str | None = None,
    skip_empty: bool = False,
) -> tuple[list[Run], list[str]]:
    """Runs of all sources, and notes on what was assumed.

    Args:
        sources: files and folders.
        mapping: FIELD=COLUMN.
        where: COLUMN=VALUE[,VALUE].
        last_of: as in `read_table`.
        skip_empty: as in `read_table`.

    Raises:
        UserError: a source that is missing or can't be read, no run that started from scratch, or losses of
            different texts.
    """
    fields = dict(_pair(text, "--map", "FIELD=COLUMN") for text in mapping)
    rows = {
        column: values.split(",")
        for column, values in (_pair(text, "--where", "COLUMN=VALUE") for text in where)
    }
    runs: list[Run] = []
    notes: list[str] = []
    others = [
        source for source in sources if source.exists() and (source.is_dir() or source.suffix == ".json")
    ]
    # what columns are called says nothing of other sources; a filter that leaves them whole would mislead
    chosen = [
        ("--map", mapping if len(others) == len(sources) else ()),
        ("--where", where),
        ("--last-of", last_of),
    ]
    given = [option for option, value in [*chosen, ("--skip-empty", skip_empty)] if value]
    for source in sources:
        if given and source in others:
            raise UserError(
                f"{given[0]} is for tables, and {source} is none; leave the option out, or give a CSV file of its runs"
            )
        if source.is_dir():
            found, said = read_folder(source)
        elif source.suffix == ".json" and source.exists():
            found, said = read_study(source)
        elif source.exists():
            found, said = read_table(source, fields, rows, last_of, skip_empty)
        else:
            raise UserError(
                f"{source}: no such file or folder; give folders of finished runs, a study's results.json or CSV files"
            )
        runs.extend(found)
        notes.extend(note for note in said if note not in notes)
    if not runs:
        raise UserError(
            "; ".join(notes) + "; the law is one of training from scratch, and no such run is left"
        )
    check_one_text(runs)
    return runs, notes


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    left, sign, right = text.partition("=")
    if not sign or not left.strip() or not right.strip():
        raise UserError(f"{option} {text}: it must have the form {form}")
    return left.strip(), right.strip()


def run(args: argparse.Namespace) -> None:
    """Read, fit, write; raises UserError on bad input, before anything is written."""
    for flops in args.decide_flops:
        if not flops > 0 or not math.isfinite(flops):
            raise UserError(f"--decide-flops is {flops:g}; it must be a finite number above 0")
    settings = Settings(law=args.law, dsmoe_form=args.dsmoe_form, draws=args.bootstrap, seed=args.seed,
                        method=args.bootstrap_method, weighting=args.weighting, hold_out=args.hold_out_largest,
                        hold_out_by=args.hold_out_by)  # fmt: skip
    settings.check()
    for option in ("plot", "output", "json"):
        path = getattr(args, option)
        if path and path != "-":
            check_new_file(path, f"--{option}")
    if args.plot:
        check_figure(args.plot, "--plot")
    runs, notes = read_sources(args.sources, args.map, args.where, args.last_of, args.skip_empty)
    fit = fit_law(runs, settings)
    content = as_json(fit, args.decide_flops)
    content["notes"] += notes
    if args.plot:
        from dsmoe.planner.fit.plots import residual_plot

        residual_plot(fit, args.plot)
    if args.output:
        write_json(args.output, content)
    if args.json and args.json != "-":
        write_json(args.json, content)
    if args.json == "-":
        print(json.dumps(content, indent=2))
    else:
        print(human_report(content))
