"""Score the finished runs of a study on the benchmarks: `python eval/score_study.py STUDY.yaml --output FOLDER`.

Dense models and SMoEs are scored as they were trained, a DS-MoE sparse: with the threshold of its mask phase, if that was
steered to exactly `--share`, otherwise sparsified to it. Options that are not listed go to eval/score.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsmoe.data.corpus import TokenCorpus
from dsmoe.errors import UserError, run_reporting_errors
from dsmoe.evaluation import score
from dsmoe.files import read_json, sha256, write_json
from dsmoe.records import add_record_arguments, check_outputs, write_concluded_record
from dsmoe.report.trained_policies import trained_policies
from dsmoe.sparsify import command as sparsify
from dsmoe.study.launcher import is_finished
from dsmoe.study.spec import StudyRun, read_study

EPILOG = """example:
  python eval/score_study.py configs/quality/largest.yaml --output runs/quality/largest --data data/quality \\
      --share 0.34375 --tasks paper --include-path benchmarks --record eval/records/quality-largest

The output folder is that of train/study.py; scores.json appears in it, and a second call scores new runs only.
"""
# in the folder of a sparsified model: of which weights and which text it is
SOURCE = "source.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Score; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        prog="score_study.py",
    )  # fmt: skip
    parser.add_argument("study", type=Path, help="the study's YAML")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of the study's runs"
    )
    parser.add_argument("--data", required=True, metavar="FOLDER", help="token folder")
    parser.add_argument(
        "--share", type=float, default=0.34375, help="active share of a DS-MoE (default: %(default)s)"
    )
    add_record_arguments(parser)
    args, of_score = parser.parse_known_args(argv)
    return run_reporting_errors(lambda: run(args, of_score))


def run(args: argparse.Namespace, of_score: Sequence[str]) -> None:
    """Sparsify and score what isn't yet, and report; raises UserError on bad input."""
    study = read_study(args.study)
    finished = [run for run in study.runs if is_finished(study, run, args.output)]
    if not finished:
        raise UserError(f"{args.output}: no finished run of {args.study}; train/study.py makes them")
    if args.record is not None:
        _check_record(args, [run.name for run in finished])
    scores = args.output / "scores.json"
    words = ["--data", args.data, "--resume", "--output", str(scores), *of_score]
    # before the first is sparsified, which takes a while
    score.checked_settings(score.build_parser().parse_args(["--model", str(args.output), *words]))
    models = [f"{run.name}={_folder(run, args)}" for run in finished]
    if score.main([*(word for model in models for word in ("--model", model)), *words]):
        raise UserError(f"{scores}: scoring stopped, see above")
    if args.record is not None:
        given = f" --share {args.share:g} {' '.join(of_score)}".rstrip()
        write_concluded_record(
            args.record, given=args.conclusion, tables=_report(read_json(scores), args.output), title=study.title,
            command=f"python eval/score_study.py {args.study} --output {args.output} --data {args.data}{given} "
            f"--record {args.record} --overwrite",
            files=[scores, scores.with_name("scores.questions.json")], overwrite=args.overwrite,
        )  # fmt: skip


def _check_record(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Before anything is scored: refuse what the record can't be written without."""
    check_outputs(record=args.record, overwrite=args.overwrite, conclusion=args.conclusion)
    for name in names:
        summary = args.output / name / "summary.json"
        if "test_loss" not in read_json(summary):
            raise UserError(
                f"{summary}: no test_loss, which --record needs; train on text with a test split "
                "(`dsmoe data prepare --test-fraction`), or score without --record"
            )


def _folder(run: StudyRun, args: argparse.Namespace) -> Path:
    """What is scored of a run, made where it isn't there or came from other weights, another policy or another text."""
    final = args.output / run.name / "final"
    summary = read_json(args.output / run.name / "summary.json")
    if summary["kind"] != "dsmoe":
        return final
    sparse = args.output / run.name / f"sparse-{args.share:g}"
    source: dict[str, Any] = {path.name: sha256(path) for path in sorted(final.glob("*.safetensors"))}
    source["corpus"] = TokenCorpus(args.data).fingerprint
    source["policy"] = trained = trained_policies(summary).get(args.share)
    known = sparse / SOURCE
    if not known.exists() or read_json(known) != source:
        parser = argparse.ArgumentParser()
        sparsify.add_parser(parser.add_subparsers())
        wanted = ["--target-active", f"{args.share:g}"]
        if trained is not None:
            wanted = ["--policy", "threshold", "--threshold", repr(trained["threshold"])]
        words = [str(final), *wanted, "--data", args.data, "--output", str(sparse), "--overwrite"]
        sparsify.run(parser.parse_args(["sparsify", *words]))
        write_json(known, source)
    return sparse


def _report(scores: dict[str, Any], output: Path) -> str:
    """The tables, with the losses on the test split that training wrote down."""
    losses = []
    for model in scores["models"]:
        summary = read_json(output / model["name"] / "summary.json")
        sparse = summary.get("test_loss_sparse")
        losses.append(f"{model['name']} {summary['test_loss'] if sparse is None else sparse:.4f}")
    return (
        f"{score.tables(scores)}\n\nTest loss at the end of training (nats per token): {', '.join(losses)}."
    )
