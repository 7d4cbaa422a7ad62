"""The records that are shipped: each says how it was made, and its files are those that were written down."""

import json
import re
from pathlib import Path

import pytest

from dsmoe.files import sha256

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
