"""Checkpoints of a run: whole or absent, restored to the bit, refused where they do not fit."""

import pytest
import torch

from dsmoe.checkpoint import load_checkpoint, newest_intact, save_checkpoint
from dsmoe.config.run import OptimSettings
from dsmoe.errors import UserError
from dsmoe.optim import build_optimizer

IDS = torch.arange(1, 13).view(2, 6)


def trained(tiny_model, steps=2, **overrides):
    model = tiny_model(dtype=torch.float32, **overrides)
    optimizer = build_optimizer(model, OptimSettings())
    for _ in range(steps):
        one_step(model, optimizer)
    return model, optimizer


def one_step(model, optimizer):
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder, model, optimizer, step, keep_last=2, **extra):
    return save_checkpoint(folder, model, optimizer, {"step": step}, extra, None, keep_last)


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_round_trip(tiny_model, tmp_path):
    model, optimizer = trained(tiny_model)
    extra = {"torch_rng": torch.get_rng_state(), "mean": torch.rand(2, 3, dtype=torch.float64)}
    path = save(tmp_path, model, optimizer, 7, **extra)
    assert path.name == "step-00000007"
    fresh, fresh_optimizer = trained(tiny_model, steps=0, seed=9)
    state, restored = load_checkpoint(path, fresh, fresh_optimizer)
    assert state == {"step": 7}
    assert restored.keys() == extra.keys() and all(torch.equal(restored[name], extra[name]) for name in extra)
    for _ in range(2):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, fresh.state_dict()[name]), name
        one_step(model, optimizer)
        one_step(fresh, fresh_optimizer)
    assert fresh.lm_head.weight is fresh.model.embed_tokens.weight


def test_newest_are_kept(tiny_model, tmp_path):
    assert newest_intact(tmp_path) is None
    model, optimizer = trained(tiny_model)
    for step in (2, 10, 100):
        save(tmp_path, model, optimizer, step)
    assert names(tmp_path) == ["latest.json", "step-00000010", "step-00000100"]
    assert newest_intact(tmp_path).name == "step-00000100"


def test_an_interrupted_save_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    model, optimizer = trained(tiny_model)
    save(tmp_path, model, optimizer, 1)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsmoe.checkpoint.folder.write_json", fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, model, optimizer, 2)
    assert names(tmp_path) == ["latest.json", "step-00000001"]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "extra.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_one_line(tiny_model, tmp_path, name, damage):
    model, optimizer = trained(tiny_model)
    path = save(tmp_path, model, optimizer, 1, value=torch.ones(3))
    if damage == "missing":
        (path / name).unlink()
    else:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError) as caught:
        load_checkpoint(path, model, optimizer)
    assert "step-00000001" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [{"hidden_size": 64}, {"num_experts": 8}, {"kind": "dense", "num_experts": 1}, {"num_hidden_layers": 1}],
    ids=str,
)
def test_another_model_is_refused(tiny_model, tmp_path, overrides):
    path = save(tmp_path, *trained(tiny_model), 1)
    model, optimizer = trained(tiny_model, steps=0, **overrides)
    with pytest.raises(UserError, match="another model"):
        load_checkpoint(path, model, optimizer)
