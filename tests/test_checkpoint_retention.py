"""Old checkpoints are kept or deleted without reading them again at every save."""

import os

import pytest
import torch

from dsmoe.checkpoint import manifest, newest_intact, retention, save_checkpoint
from dsmoe.config.run import OptimSettings
from dsmoe.optim import build_optimizer


@pytest.fixture
def save(tiny_model, tmp_path):
    """save(step, keep_last=3) -> the folder of a checkpoint of a tiny model in tmp_path."""
    model = tiny_model(dtype=torch.float32)
    optimizer = build_optimizer(model, OptimSettings())
    return lambda step, keep_last=3: save_checkpoint(
        tmp_path, model, optimizer, {"step": step}, {"tensor": torch.zeros(2)}, None, keep_last
    )


@pytest.fixture
def verified(monkeypatch):
    """Names of the folders that are verified by reading them."""
    names = []

    def find_damage(folder):
        names.append(folder.name[-1])
        return manifest.find_damage(folder)

    monkeypatch.setattr(retention, "find_damage", find_damage)
    return names


def steps(folder):
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-*"))


def test_what_this_process_wrote_is_not_read_again(save, verified, tmp_path):
    for step in range(1, 6):
        save(step)
    assert steps(tmp_path) == [3, 4, 5] and verified == []


def test_what_another_process_wrote_is_read_once(save, verified, tmp_path, monkeypatch):
    save(1), save(2)
    monkeypatch.setattr(retention, "_verified", {})
    save(3), save(4), save(5)
    # 1 and 2 beside 3, then both were known
    assert steps(tmp_path) == [3, 4, 5] and verified == ["2", "1"]


@pytest.mark.parametrize("same_times", [True, False])
@pytest.mark.parametrize("size", [0, 3])
def test_a_touched_file_is_read_and_found_out(save, verified, tmp_path, size, same_times):
    save(1), save(2)
    file = save(3) / "model.safetensors"
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content[: len(content) - size])
    if same_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    save(4, keep_last=2)
    assert verified == ["3"] and steps(tmp_path) == [2, 4]


def test_the_last_intact_one_stays_whatever_is_remembered(save, tmp_path, monkeypatch):
    """Damage that no time and size tells is found on resume, which reads everything; the newest was never in doubt."""
    damaged = save(1) / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    monkeypatch.setitem(retention._verified, damaged.parent, retention._signs(damaged.parent))
    save(2, keep_last=2)
    assert steps(tmp_path) == [1, 2] and newest_intact(tmp_path).name == "step-00000002"
    assert manifest.find_damage(damaged.parent) is not None
