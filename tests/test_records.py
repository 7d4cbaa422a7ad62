"""The records that are shipped: each says how it was made, and its files are those that were written down."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from dsmoe.errors import UserError
from dsmoe.files import sha256
from dsmoe.records import (
    check_outputs,
    check_record_folder,
    give_results,
    write_concluded_record,
    write_record,
)

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "eval" / "records").glob("*/record.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_a_record_is_as_it_was_written(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    files = {file.name for file in path.parent.iterdir()} - {"README.md", "record.json"}
    assert files >= set(record["files"])
    for name, digest in record["files"].items():
        assert sha256(path.parent / name) == digest, name
    assert record["command"] in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.parent.name)
def test_its_command_names_files_that_exist(path):
    words = json.loads(path.read_text(encoding="utf-8"))["command"].split()
    for word in words:
        if re.fullmatch(r"(train|eval|configs)/[\w/.]+\.(py|yaml|sh)", word):
            assert (ROOT / word).is_file(), word


def write(folder, **more):
    write_record(folder, title="t", command="c", conclusion="", files=[], **more)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["precious.txt"], "has no record.json"),
        (["record.json", "runs/precious.txt"], "holds a folder, runs"),
        (["a/precious.txt"], "holds a folder, a"),
    ],
)
@pytest.mark.parametrize("overwrite", [True, False])
def test_only_a_record_is_replaced(tmp_path, names, words, overwrite):
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    with pytest.raises(UserError, match=words):
        write(tmp_path / "folder", overwrite=overwrite)
    assert all((tmp_path / "folder" / name).read_text() == "precious" for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_where_a_record_may_stand(tmp_path):
    folder = tmp_path / "folder"
    assert not check_record_folder(folder / "deep" / "record", overwrite=False)
    folder.mkdir()
    assert not check_record_folder(folder, overwrite=False)
    write(folder)
    assert check_record_folder(folder)
    write(folder, overwrite=True)
    with pytest.raises(UserError, match="--overwrite"):
        write(folder)
    with pytest.raises(UserError, match="is a file"):
        check_record_folder(folder / "README.md")
    with pytest.raises(UserError, match=r"README\.md is a file"):
        check_record_folder(folder / "README.md" / "record")


@pytest.mark.parametrize("name", ["record", "empty"])
def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch, name):
    write(tmp_path / "record")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / name)
    for place in (".", f"../{name}"):
        with pytest.raises(UserError, match="current folder"):
            check_record_folder(place)


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"record": "folder"}, "is no record"),
        ({"record": "folder/record"}, "the record exists"),
        (
            {"record": "new", "conclusion": "missing.md"},
            "--conclusion missing.md: can't be read (No such file",
        ),
        ({"record": "new", "conclusion": "folder"}, "--conclusion folder: can't be read (Is a directory"),
        ({"record": "new", "conclusion": "binary"}, "--conclusion binary: is no text in UTF-8"),
        ({"json": "folder"}, "--json folder: is a folder"),
        ({"plot": "a.svg"}, "--plot a.svg: plots are PNG files"),
        ({"plot": "binary/a.png"}, "--plot binary/a.png: "),
    ],
)
def test_outputs_that_cannot_be_written(tmp_path, monkeypatch, outputs, words):
    monkeypatch.chdir(tmp_path)
    write("folder/record")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as raised:
        check_outputs(**{name: Path(place) for name, place in outputs.items()})
    assert words in str(raised.value) and "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "binary"}


def test_outputs_that_can_be_written(tmp_path):
    (tmp_path / "text.md").write_text("Ein Schluß.", encoding="utf-8")
    write(tmp_path / "record")
    more = {
        "conclusion": tmp_path / "text.md",
        "json": str(tmp_path / "new" / "a.json"),
        "plot": tmp_path / "A.PNG",
    }
    check_outputs(record=tmp_path / "record", overwrite=True, **more)
    check_outputs(record=tmp_path / "new", **more)
    check_outputs(json="-", conclusion=tmp_path / "missing.md")  # without a record it isn't read
    assert {path.name for path in tmp_path.iterdir()} == {"text.md", "record"}
    # a conclusion survives the record that it stands in, whether it is named or not
    folder = tmp_path / "record"
    for given in (tmp_path / "text.md", folder / "conclusion.md", None):
        write_concluded_record(
            folder, given=given, tables="| a |", files=[], title="t", command="c", overwrite=True
        )
        assert "Ein Schluß.\n\n| a |" in (folder / "README.md").read_text(encoding="utf-8")


def test_results_are_printed_first(tmp_path, capsys, monkeypatch):
    """Files that can't be written cost nothing that is on the screen, and a closed pipe costs no file."""
    seen = []

    def write_rest():
        seen.append(capsys.readouterr().out)

    give_results({"a": 1}, "report", str(tmp_path / "a.json"), write_rest)
    give_results({"a": 1}, "report", "-", write_rest)
    assert seen == ["report\n", '{\n  "a": 1\n}\n'] and json.loads((tmp_path / "a.json").read_text()) == {
        "a": 1
    }
    with pytest.raises(IsADirectoryError):
        give_results({}, "report", str(tmp_path), pytest.fail)
    assert capsys.readouterr().out == "report\n"

    def closed(text):
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", closed)
        with pytest.raises(BrokenPipeError):
            give_results({"b": 2}, "report", str(tmp_path / "b.json"), lambda: seen.append("written"))
    assert seen[-1] == "written" and (tmp_path / "b.json").exists()


@pytest.mark.parametrize("script", ["fit_scaling.py --runs", "fit_routed.py --data"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--output", "folder/record"], "the record exists"),
        (["--output", "folder", "--overwrite"], "is no record"),
        (["--output", "new", "--conclusion", "missing.md"], "--conclusion missing.md: can't be read"),
    ],
)
def test_a_fit_is_refused_before_it_is_made(tmp_path, monkeypatch, capsys, script, options, words):
    """Before its data is read, too: there is none."""
    monkeypatch.chdir(tmp_path)
    write("folder/record")
    name, option = script.split()
    monkeypatch.setattr(sys, "argv", [name, option, "no-data.csv", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "eval" / name), run_name="__main__")
    assert ended.value.code == 2 and words in capsys.readouterr().err
