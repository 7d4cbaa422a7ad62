"""Model folders: the layout on disk, the way back, and loading by stock tools."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from dsmoe import DSMoEForCausalLM, DSMoEModel
from dsmoe.checkpoint import save_checkpoint, save_pretrained
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.config.run import OptimSettings
from dsmoe.errors import UserError
from dsmoe.optim import build_optimizer

IDS = torch.arange(1, 13).view(2, 6)
MODELS = {
    "dense": {"kind": "dense", "num_experts": 1},
    "dsmoe": {},
    "gelu": {"mlp_type": "gelu", "tie_word_embeddings": False},
    # one expert is as wide as the model: nothing but the rule tells [N, F, D] from [N, D, F]
    "square": {"intermediate_size": 128},
    "square_moa": {
        "intermediate_size": 128,
        "num_attention_experts": 2,
        "qk_norm": "per_head",
        "head_dim": 16,
    },
    "square_dense": {"kind": "dense", "num_experts": 1, "intermediate_size": 32, "mlp_type": "gelu"},
}
POLICIES = [{"policy": "threshold", "threshold": 0.4871}, {"policy": "top_k", "k": 2}]


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_disk_layout_and_way_back(tiny_model, overrides, tmp_path):
    model = tiny_model(dtype=torch.float32, **overrides)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_pretrained(model, tmp_path / "model", None)
    on_disk = load_file(tmp_path / "model" / "model.safetensors")
    transposed = 0
    for name, tensor in before.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        turned = name.endswith(("mlp.experts.down_proj", "self_attn.experts_o_proj"))
        transposed += turned
        assert torch.equal(on_disk.pop(name), tensor.transpose(1, 2) if turned else tensor), name
        assert torch.equal(model.state_dict()[name], tensor), f"saving changed {name}"
    assert not on_disk
    assert transposed == 2 * (2 if model.config.num_attention_experts > 1 else 1)
    for loaded in (
        DSMoEForCausalLM.from_pretrained(tmp_path / "model"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        load_pretrained(tmp_path / "model", torch.float32)[0],
    ):
        assert isinstance(loaded, DSMoEForCausalLM)
        assert set(loaded.state_dict()) == set(before)
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    base = AutoModel.from_pretrained(tmp_path / "model")
    assert isinstance(base, DSMoEModel)
    assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_says_who_may_read_the_weights(tiny_model, tmp_path, umask):
    model = tiny_model(dtype=torch.float32)
    before = os.umask(umask)
    try:
        save_pretrained(model, tmp_path / "model", None)
        optimizer, extra = build_optimizer(model, OptimSettings()), {"x": torch.ones(1)}
        checkpoint = save_checkpoint(tmp_path, model, optimizer, {"step": 1}, extra, None, 1)
    finally:
        os.umask(before)
    for folder in (tmp_path / "model", checkpoint):
        found = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
        assert "model.safetensors" in found and set(found.values()) == {0o666 & ~umask}, found


def test_twice_saved_is_the_same(tiny_model, tmp_path):
    save_pretrained(tiny_model(dtype=torch.float32), tmp_path / "a", None)
    save_pretrained(DSMoEForCausalLM.from_pretrained(tmp_path / "a"), tmp_path / "b", None)
    for name in ("model.safetensors", "dsmoe_shim.py"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in "ab"]
    assert configs[0] == configs[1]


def test_routing_policies_are_kept(tiny_model, tmp_path):
    model = tiny_model(dtype=torch.float32, mlp_routing=POLICIES)
    save_pretrained(model, tmp_path / "model", None)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = DSMoEForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
        assert loaded.dtype == dtype
        assert loaded.config.mlp_routing == POLICIES
    assert model.to(torch.bfloat16).config.mlp_routing == POLICIES
    assert not any("threshold" in name for name, _ in model.named_buffers())


def test_bfloat16_weights_are_rounded_once(tiny_model, tmp_path):
    """Loading in bfloat16 rounds the weights and no angle of the rotation."""
    model = tiny_model(dtype=torch.float32)
    save_pretrained(model, tmp_path / "model", None)
    loaded = DSMoEForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16()), name
    assert not list(loaded.buffers())


def test_stock_tools_load_it_through_the_shim(tiny_model, tmp_path):
    """A process that never imports dsmoe itself."""
    model = tiny_model(dtype=torch.float32, mlp_routing=POLICIES)
    save_pretrained(model, tmp_path / "model", None)
    torch.save(model(IDS).logits, tmp_path / "expected.pt")
    script = f"""
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "dsmoe" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
ids = torch.arange(1, 13).view(2, 6)
assert torch.equal(model(ids).logits, torch.load({str(tmp_path / "expected.pt")!r}))
base = AutoModel.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
config = AutoConfig.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
print(type(model).__name__, type(base).__name__, config.mlp_routing[0]["threshold"])
"""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DSMoEForCausalLM", "DSMoEModel", "0.4871"]


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_that_do_not_fit_are_refused(tiny_model, tmp_path, change):
    """transformers would draw what is missing at random and say so in a warning."""
    save_pretrained(tiny_model(dtype=torch.float32), tmp_path / "model", None)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["model.layers.1.mlp.router.weight"]
    elif change == "unexpected":
        tensors["model.layers.2.mlp.router.weight"] = torch.ones(4, 32)
    else:
        tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path / "model", torch.float32)
    assert str(tmp_path / "model") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hidden_size", "big", "'hidden_size' expected int, got str (value: 'big')"),
        ("hidden_size", 0, "model.hidden_size is 0; it must be at least 1"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": "far"}, "far"),
    ],
)
def test_a_bad_field_of_the_config_is_named(tiny_model, tmp_path, field, value, expected):
    save_pretrained(tiny_model(dtype=torch.float32), tmp_path / "model", None)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_pretrained(tmp_path / "model", torch.float32)
    assert str(caught.value).startswith(f"{tmp_path / 'model'}: ") and expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals(tiny_model, tmp_path):
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(UserError, match="no model folder"):
        load_pretrained(tmp_path / "absent", torch.float32)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="model_type is 'llama'"):
        load_pretrained(tmp_path / "other", torch.float32)
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(model, tmp_path / "other", None)
    save_pretrained(model, tmp_path / "other", None, overwrite=True)
    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="can't be read"):
        load_pretrained(tmp_path / "other", torch.float32)


@pytest.mark.parametrize(
    "entry", [{"dtype": "foo"}, {"num_experts": "four"}, {"rope_parameters": {"rope_theta": -1.0}}]
)
def test_entries_of_the_wrong_kind_are_one_line(tiny_model, tmp_path, entry):
    save_pretrained(tiny_model(), tmp_path / "model", None)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entry}))
    with pytest.raises(UserError) as problem:
        load_pretrained(tmp_path / "model", torch.float32)
    assert str(tmp_path / "model") in str(problem.value) or "rope_theta is -1.0" in str(problem.value)
    assert len(str(problem.value).splitlines()) == 1
