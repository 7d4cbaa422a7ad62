"""The command line of `train/study.py`."""

import argparse
import fnmatch
import json
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from dsmoe.errors import UserError, disk_is_full, run_reporting_errors
from dsmoe.files import write_json, write_text
from dsmoe.records import write_record
from dsmoe.study.kept import Kept, read_kept
from dsmoe.study.launcher import is_finished, launch
from dsmoe.study.plot import curves_plot, losses_plot, pairs_plot, routers_plot
from dsmoe.study.rehearse import check_runs
from dsmoe.study.routers import router_courses, shortened
from dsmoe.study.spec import Study, StudyRun, check_setting, read_study
from dsmoe.study.tabulate import collect, table

EPILOG = """examples:
  python train/study.py configs/scaling/sweep.yaml --output runs/scaling --workers 2 --threads 1
  python train/study.py configs/scaling/sweep.yaml --output runs/scaling --only 'dsmoe-*' --minutes 60
  python train/study.py configs/scaling/sweep.yaml --output runs/scaling --table-only --record eval/records/scaling-sweep

Run it again after an interruption: finished runs are kept, the others go on from their last checkpoint. The output folder
gets a folder per run, results.json, table.md, the runs' logs (logs.jsonl), losses.png, pairs.png (differences with their
intervals) and curves.png where the study has such, and routers.png (are experts used alike, does each token choose?). A
record holds them too. What it holds of these settings and this text is not trained again where the run's folder is gone;
without --record everything is. A record isn't replaced by one without its finished runs.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(
        description="Run, resume and tabulate a study: many training runs that one YAML names.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", help="the study's YAML")
    parser.add_argument("--output", required=True, type=Path, help="folder of the runs and their table")
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at a time, spread over the GPUs (default 1)"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads of each run (default: torch's)")
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long (default: no limit)")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="runs whose name matches, for example 'dense-*'"
    )
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting for every run, "
                        "for example data.path=data/mine (repeatable)")  # fmt: skip
    parser.add_argument("--record", type=Path, metavar="DIR", help="also write what is finished as a record, for example "
                        "eval/records/scaling-sweep")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the runs' names and stop")
    parser.add_argument("--table-only", action="store_true", help="run nothing; tabulate what is finished")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; returns the exit status."""
    args = build_parser().parse_args(argv)
    return run_reporting_errors(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.workers < 1 or args.threads < 0 or not 0 <= args.minutes < float("inf"):
        raise UserError(
            f"--workers {args.workers}, --threads {args.threads} and --minutes {args.minutes:g}: workers must be at "
            "least 1, the others at least 0"
        )
    study = read_study(args.study)
    for setting in args.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r} must be NAME=VALUE, for example data.path=data/mine")
        check_setting(name, f"--set {setting!r}")
        for run in study.runs:
            run.settings[name] = _as_in_yaml(value)
    chosen = [run for run in study.runs if fnmatch.fnmatch(run.name, args.only)]
    if not chosen:
        raise UserError(f"--only {args.only!r} matches no run; --list prints them")
    if not args.table_only:
        check_runs(study, chosen, args.output)
    if args.list:
        print("\n".join(run.name for run in chosen))
        return
    with _clear_about_the_disk(args.output):
        _carry_out(args, study, chosen)


def _as_in_yaml(text: str) -> Any:
    """The value that a study's YAML would have: 0.7 a number, so that runs of either are the same."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _carry_out(args: argparse.Namespace, study: Study, chosen: Sequence[StudyRun]) -> None:
    """Train, tabulate, record."""
    kept = _kept(args, study)
    finished = {run.name for run in study.runs if is_finished(study, run, args.output)}
    failed: dict[str, str] = {}
    to_do = [run for run in chosen if run.name not in kept.rows or (args.output / run.name).exists()]
    _check_replaced(args, study, kept, finished, [] if args.table_only else to_do)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: {error.strerror}; name a folder that can be made") from None
    if not args.table_only:
        failed = launch(
            study, to_do, args.output, workers=args.workers, threads=args.threads, minutes=args.minutes
        )["failed"]
    results = collect(study, args.output, kept)
    write_json(args.output / "results.json", results)
    problems = []
    if results["runs"]:
        write_text(args.output / "table.md", table(results) + "\n")
        files = ["results.json", *_draw(args.output, results, kept)]
        print(table(results))
    print(json.dumps({"finished": len(results["runs"]), "missing": len(results["missing"])}), file=sys.stderr)
    if failed:
        name, words = next(iter(failed.items()))
        problems.append(f"{len(failed)} run(s) failed, the first {args.output / name}: {words}")
    if args.record and results["runs"]:
        lost = kept.lost(study, {run["name"] for run in results["runs"]})
        if lost:
            problems.append(_not_replaced(args.record, lost))
        else:
            _write_record(args, study, results, files, failed)
    if problems:
        raise UserError("; ".join(problems))


def _kept(args: argparse.Namespace, study: Study) -> Kept:
    """What the record holds already; refuses a folder that no record of this study may stand in."""
    if args.record is None:
        return Kept()
    record, output = args.record.resolve(), args.output.resolve()
    if record == output or record in output.parents:
        raise UserError(
            f"--record {args.record}: holds --output {args.output}; a record needs its own folder"
        )
    return read_kept(study, args.record)


def _check_replaced(
    args: argparse.Namespace, study: Study, kept: Kept, finished: set[str], to_do: Sequence[StudyRun]
) -> None:
    """Before any training: refuse a record that this call can't make whole again; say what is trained again."""
    coming = {run.name for run in to_do}
    lost = kept.lost(study, {*kept.rows, *finished, *coming})
    if lost:
        raise UserError(_not_replaced(args.record, lost))
    again = [name for name in kept.others if name in coming - finished]
    if again:
        print(
            f"note: {args.record}: {len(again)} of its runs are of other settings or of another text, and are trained "
            "again; it is replaced when all of them have finished",
            file=sys.stderr,
        )


def _not_replaced(record: Path, lost: Sequence[str]) -> str:
    return (
        f"--record {record}: is not replaced, since it holds {len(lost)} finished run(s) that the new one would not, "
        f"the first {lost[0]} (of other settings, another text, or unknown ones); finish them in --output, name another "
        "--record, or remove the old one"
    )


@contextmanager
def _clear_about_the_disk(output: Path) -> Iterator[None]:
    """Turn what the system says of files and folders into one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if disk_is_full(error):
            raise UserError(
                f"{output}: the disk is full ({error}); finished runs are kept, and the others go on from their last "
                "checkpoint: make room and give the same command again"
            ) from None
        if error.filename is None:
            raise
        raise UserError(f"{error.filename}: {error.strerror}; it must be free to read and write") from None


def _draw(output: Path, results: Mapping[str, Any], kept: Kept) -> list[str]:
    """Write the runs' logs and what there is to look at; returns the names of the files."""
    lines = list(_logs(output, results, kept))
    write_text(output / "logs.jsonl", "".join(lines))
    losses_plot(results, output / "losses.png")
    names = ["losses.png"]
    # a study that has just begun has no pairs, and curves without points
    if results["pairs"]:
        pairs_plot(results, output / "pairs.png")
        names.append("pairs.png")
    if any(curve["points"] for curve in results["curves"]):
        curves_plot(results, output / "curves.png")
        names.append("curves.png")
    courses = router_courses(lines, results["runs"])
    if courses:
        routers_plot(courses, output / "routers.png")
        names.append("routers.png")
    return [*names, "logs.jsonl"]


def _write_record(
    args: argparse.Namespace,
    study: Study,
    results: Mapping[str, Any],
    files: Sequence[str],
    failed: Collection[str],
) -> None:
    """The record of what is finished; it says so where something is missing."""
    missing = len(results["missing"])
    partial = (
        f"PARTIAL: {missing} of {len(study.runs)} runs are missing{_of_which(failed)}. " if missing else ""
    )
    settings = "".join(f" --set {shlex.quote(setting)}" for setting in args.set)
    write_record(
        args.record,
        title=study.title,
        command=f"python train/study.py {args.study} --output {args.output}{settings} --record {args.record}",
        conclusion=f"{partial}{study.conclusion}\n\n{table(results)}",
        files=[args.output / name for name in files],
        details={
            "data": results["environment"].get("corpus"), "missing": results["missing"], "failed": sorted(failed),
        },
        overwrite=True,
    )  # fmt: skip


def _of_which(failed: Collection[str]) -> str:
    return f", of which these failed: {', '.join(sorted(failed))}" if failed else ""


def _logs(output: Path, results: Mapping[str, Any], kept: Kept) -> Iterator[str]:
    """The log lines of the finished runs, each with the run's name; of the routers' statistics the short ones."""
    for run in results["runs"]:
        path = output / run["name"] / "log.jsonl"
        # a run that has begun again stands in the results as the record has it
        if not path.with_name("summary.json").exists():
            yield from kept.logs[run["name"]]
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.dumps({"run": run["name"], **shortened(json.loads(line))}) + "\n"
