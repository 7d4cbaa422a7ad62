"""Files: YAML without keys that vanish, and folders that appear whole."""

import os
from pathlib import Path

import pytest

from dsmoe.errors import UserError
from dsmoe.files import check_new_folder, load_yaml, new_folder


def test_yaml_with_anchors_and_merges_is_as_pyyaml_reads_it(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: *a\nd: {<<: [*a, {z: 4}], y: 5}\n1: {x: é}\n", "utf-8"
    )
    a = {"x": 1, "y": 2}
    assert load_yaml(path) == {
        "a": a,
        "b": {"x": 3, "y": 2},
        "c": a,
        "d": {"x": 1, "y": 5, "z": 4},
        1: {"x": "é"},
    }
    path.write_text("")
    assert load_yaml(path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: {c: 1, d: {e: 1, e: 2}}", "line 2: the key 'e' stands twice in one mapping"),
        (b"a: {<<: {x: 1}, y: 1, y: 2}", "the key 'y' stands twice"),
        (b"a: 1\nb: ]", "line 2: "),
        (b"a: \xff\xfe", "can't decode"),
        (b"a: 2024-13-01", "month must be in 1..12"),
        (b"a: \x00", "special characters are not allowed"),
        (b"[" * 5000, "recursion"),
    ],
)
def test_bad_yaml_is_one_line(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError) as problem:
        load_yaml(path)
    assert str(problem.value).startswith(f"{path}: ") and words in str(problem.value)
    assert len(str(problem.value).splitlines()) == 1


@pytest.mark.parametrize(("name", "words"), [("missing.yaml", "No such file"), ("", "Is a directory")])
def test_a_yaml_that_cannot_be_read_is_one_line(tmp_path, name, words):
    with pytest.raises(UserError, match=words):
        load_yaml(tmp_path / name)


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def fail_for_the_new(path, target):
        if (path / "new").exists():
            raise OSError("a made-up problem")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(OSError, match="made-up"), new_folder(folder, overwrite=True) as beside:
        (beside / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "old"]
    monkeypatch.undo()
    with new_folder(folder, overwrite=True) as beside:
        (beside / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_a_folder_that_is_or_holds_what_is_read_is_not_replaced(tmp_path):
    data, elsewhere = tmp_path / "parent" / "data", tmp_path / "elsewhere"
    data.mkdir(parents=True)
    elsewhere.mkdir()
    (elsewhere / "text").touch()
    (data / "link").symlink_to(elsewhere / "text")
    (tmp_path / "alias").symlink_to(data)
    # the folder itself, by another name, one that holds it, one that holds the link, one that holds its target
    for output in (data, tmp_path / "alias", tmp_path / "parent" / ".." / "parent", data, elsewhere):
        with (
            pytest.raises(UserError, match="which is read"),
            new_folder(output, overwrite=True, inputs=[data / "link"]),
        ):
            pass
    assert (data / "link").exists()
    # beside it, within it, and what is not there
    check_new_folder(tmp_path / "other", inputs=[data / "link"])
    check_new_folder(data / "new", inputs=[data])
    check_new_folder(tmp_path / "missing", inputs=[tmp_path / "missing"])


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with new_folder(tmp_path / "link", overwrite=True) as beside:
        (beside / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]


@pytest.mark.parametrize("output", [".", "..", "../current"])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, output):
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    with pytest.raises(UserError, match="current folder"), new_folder(output, overwrite=True):
        pass
    assert (tmp_path / "current").is_dir()


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A summary that says that it is there must not outlive it in a power failure."""
    done = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.fstat(handle).st_ino), sync(handle)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (done.append("renamed"), rename(self, to))[1])
    with new_folder(tmp_path / "folder") as folder:
        (folder / "inner").mkdir()
        for name in ("a", "inner/b"):
            (folder / name).write_text(name)
    before, after = done[: done.index("renamed")], done[done.index("renamed") + 1 :]
    made = [tmp_path / "folder" / name for name in ("", "a", "inner", "inner/b")]
    assert {path.stat().st_ino for path in made} <= set(before)
    assert tmp_path.stat().st_ino in after
