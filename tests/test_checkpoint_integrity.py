"""Damage is found and named, the newest intact checkpoint is taken, and the last one is never deleted."""

import errno
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors import SafetensorError

from dsmoe.checkpoint import clean_leftovers, discard, newest_intact, save_checkpoint, told_when_full
from dsmoe.checkpoint.manifest import find_damage
from dsmoe.checkpoint.newest import pointed_to
from dsmoe.config.run import OptimSettings
from dsmoe.errors import UserError
from dsmoe.optim import build_optimizer


@pytest.fixture
def save(tiny_model, tmp_path):
    """save(step, keep_last=2) -> the folder of a checkpoint of a tiny model in tmp_path."""
    model = tiny_model(dtype=torch.float32)
    optimizer = build_optimizer(model, OptimSettings())
    extra = {"tensor": next(model.parameters()).detach()}

    def make(step, keep_last=2):
        return save_checkpoint(tmp_path, model, optimizer, {"step": step}, extra, None, keep_last)

    return make


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def grow(path):
    path.write_bytes(path.read_bytes() + b" ")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {"truncated": truncate, "changed": flip, "missing": os.remove}


def steps(folder):
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "extra.safetensors", "state.json", "config.json"]
)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(save, tmp_path, capsys, name, kind):
    older, newer = save(1), save(2)
    assert find_damage(older) is find_damage(newer) is None
    assert newest_intact(tmp_path) == newer and pointed_to(tmp_path) == newer.name
    DAMAGE[kind](newer / name)
    assert newest_intact(tmp_path) == older
    told = capsys.readouterr().err
    assert told.startswith(f"warning: {newer / name}: {kind}") and "falling back to step-00000001" in told
    assert told.count("\n") == 1
    assert pointed_to(tmp_path) == older.name


@pytest.mark.parametrize("damage", [os.remove, truncate, lambda path: path.write_text('{"files": [1]}')])
def test_a_damaged_manifest_is_damage(save, tmp_path, damage):
    older, newer = save(1), save(2)
    damage(newer / "manifest.json")
    assert str(newer / "manifest.json") in find_damage(newer)
    assert newest_intact(tmp_path) == older


def test_a_longer_file_is_changed(save):
    path = save(1)
    grow(path / "state.json")
    assert "changed" in find_damage(path)


def test_a_missing_folder_is_told(save, tmp_path, capsys):
    older, newer = save(1), save(2)
    shutil.rmtree(newer)
    assert newest_intact(tmp_path) == older
    assert f"warning: {newer}: missing" in capsys.readouterr().err
    assert newest_intact(tmp_path) == older
    assert not capsys.readouterr().err


def test_without_an_intact_one(save, tmp_path):
    assert newest_intact(tmp_path) is None
    flip(save(1) / "state.json")
    with pytest.raises(UserError, match=r"no checkpoint is intact .*state\.json: changed") as caught:
        newest_intact(tmp_path)
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000001")
    with pytest.raises(UserError, match="step-00000001: missing"):
        newest_intact(tmp_path)


@pytest.mark.parametrize("content", [None, "", "{}", '{"checkpoint": "../elsewhere"}', '{"checkpoint": 3}'])
def test_a_broken_pointer_is_set_right(save, tmp_path, content):
    path = save(1)
    pointer = tmp_path / "checkpoints" / "latest.json"
    pointer.unlink()
    if content is not None:
        pointer.write_text(content)
    assert newest_intact(tmp_path) == path
    assert json.loads(pointer.read_text()) == {"checkpoint": "step-00000001", "step": 1}


def test_the_pointer_moves_after_the_folder_stands(save, tmp_path, monkeypatch):
    """Killed between the two, the run goes on from the new one, and the pointer was right all the time."""
    older = save(1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dsmoe.checkpoint.folder.point_to", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        save(2)
    assert pointed_to(tmp_path) == older.name and find_damage(older) is None
    assert newest_intact(tmp_path).name == "step-00000002"


def test_damaged_ones_do_not_count_as_kept(save, tmp_path):
    for step in (1, 2, 3):
        path = save(step, keep_last=3)
    flip(path / "model.safetensors")
    save(4, keep_last=2)
    assert steps(tmp_path) == [2, 4]
    flip(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors")
    assert newest_intact(tmp_path).name == "step-00000002"
    # training goes on from 2 and reaches another step first: what failed goes
    save(3, keep_last=2)
    assert steps(tmp_path) == [2, 3]


def test_one_is_enough(save, tmp_path):
    save(1, keep_last=1)
    save(2, keep_last=1)
    assert steps(tmp_path) == [2]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_of_rust(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error", [full, full_of_rust])
@pytest.mark.parametrize("writer", ["save_file", "write_json", "write_manifest", "write_pretrained"])
def test_a_full_disk_costs_nothing(save, tmp_path, monkeypatch, writer, error):
    older = save(1)
    monkeypatch.setattr(f"dsmoe.checkpoint.folder.{writer}", error)
    with pytest.raises(UserError, match="disk is full") as caught:
        save(2, keep_last=1)
    assert "step-00000002" in str(caught.value) and "\n" not in str(caught.value)
    assert names(tmp_path / "checkpoints") == ["latest.json", "step-00000001"]
    assert newest_intact(tmp_path) == older


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "optimizer.safetensors"])
def test_a_real_limit(save, tmp_path, file):
    """Files can't grow to the size of `file`: each limit stops another writer."""
    older = save(1)
    limit = (older / file).stat().st_size - 1
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="disk is full"):
            save(2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert names(tmp_path / "checkpoints") == ["latest.json", "step-00000001"]
    assert newest_intact(tmp_path) == older


def test_other_errors_are_no_full_disk(tmp_path):
    with pytest.raises(PermissionError), told_when_full(tmp_path):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(SafetensorError), told_when_full(tmp_path):
        raise SafetensorError("Error while deserializing header")


def test_leftovers(tmp_path):
    ours = [".step-00000003.0123abcd.tmp", ".final.0123abcd.tmp", ".checkpoints.0123abcd.tmp"]
    files = [".summary.json.0123abcd.tmp", ".latest.json.ffffffff.tmp"]
    others = [
        ".step-3.0123abcd.tmp",
        ".notes.0123abcd.tmp",
        "step-00000003",
        ".final.tmp",
        ".final.0123abcg.tmp",
    ]
    for name in [*ours, *others]:
        (tmp_path / name / "sub").mkdir(parents=True)
    for name in files:
        (tmp_path / name).write_text("{")
    assert sorted(clean_leftovers([tmp_path, tmp_path / "absent"])) == sorted([*ours, *files])
    assert names(tmp_path) == sorted(others)


def test_half_deleted_is_not_half_there(tmp_path, monkeypatch):
    (tmp_path / "step-00000001").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        discard(tmp_path / "step-00000001")
    assert not (tmp_path / "step-00000001").exists()
    assert len(clean_leftovers([tmp_path])) == 1 and not names(tmp_path)
    discard(tmp_path / "absent")
