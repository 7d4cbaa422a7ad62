"""The records that are shipped: each says how it was made, and its files are those that were written down."""

import json
import re
from pathlib import Path

import pytest

from dsmoe.errors import UserError
from dsmoe.files import sha256
from dsmoe.records import check_record_folder, write_record

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
