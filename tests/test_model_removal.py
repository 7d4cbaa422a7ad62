"""Removing experts: what stays is the same model, on disk too; what can't be is refused and changes nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dsmoe import DSMoEForCausalLM
from dsmoe.accounting import total_parameters
from dsmoe.checkpoint import save_pretrained
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.model import quantize_int8, remove_experts, set_routing, use_routing
from dsmoe.model.routing import keep_experts

IDS = torch.arange(1, 13).view(2, 6)
MOA = {"num_attention_experts": 2, "qk_norm": "per_head"}
# one expert as wide as the model: nothing but the rule tells [N, F, D] from [N, D, F] on disk
SQUARE_MOA = {**MOA, "intermediate_size": 128, "head_dim": 16}
KEPT = [[0, 2, 3], [1]]
POLICIES = [
    {"policy": "threshold", "threshold": [0.5, 1.0, 0.25, 0.75], "score_weights": [0.5, 1.0, 2.0, 1.5]},
    {"policy": "top_k", "k": 1},
]


def reduced(model, mlp=KEPT, attention=None):
    remove_experts(model, "mlp", mlp)
    if attention is not None:
        remove_experts(model, "attention", attention)
    return model


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_weights_of_the_kept_experts_alone_stay(tiny_model, mlp_type):
    whole = tiny_model(**MOA, mlp_type=mlp_type)
    model = reduced(copy.deepcopy(whole), attention=[None, [1]])
    assert model.config.mlp_kept_experts == KEPT
    assert model.config.attention_kept_experts == [[0, 1], [1]]
    assert [model.config.kept_experts("attention", layer) for layer in (0, 1)] == [None, [1]]
    assert model.config.num_experts == 4
    before = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        expected = before[name]
        if ".experts." in name:
            expected = expected[KEPT[int(name.split(".")[2])]]
        elif "experts_" in name and ".1." in name:
            expected = expected[[1]]
        assert type(parameter) is torch.nn.Parameter and parameter.requires_grad
        assert torch.equal(parameter, expected) and parameter.is_contiguous(), name
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert stored == total_parameters(model.config) < total_parameters(whole.config)


def test_a_model_made_from_the_config_is_the_same(tiny_model):
    """Initial weights belong to an expert, whichever others are stored."""
    removed = reduced(tiny_model(**MOA), attention=[[0], [1]])
    made = tiny_model(**MOA, mlp_kept_experts=KEPT, attention_kept_experts=[[0], [1]])
    assert made.state_dict().keys() == removed.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(tensor, removed.state_dict()[name]), name
    assert torch.equal(made(IDS).logits, removed(IDS).logits)


def test_removal_in_steps_is_removal_at_once(tiny_model):
    at_once, in_steps = reduced(tiny_model(), [[2, 3], [0]]), tiny_model()
    for kept in ([[0, 2, 3], None], [None, [0, 1]], [[2, 3], None], [None, [0]]):
        remove_experts(in_steps, "mlp", kept)
    assert in_steps.config.to_dict() == at_once.config.to_dict()
    assert torch.equal(in_steps(IDS).logits, at_once(IDS).logits)


def test_keeping_all_changes_nothing(tiny_model):
    model = tiny_model()
    parameters = list(model.parameters())
    for kept in ([None, None], [list(range(4)), None]):
        remove_experts(model, "mlp", kept)
        assert model.config.mlp_kept_experts is None
    assert all(before is after for before, after in zip(parameters, model.parameters()))
    dense_twin = tiny_model(kind="dense", num_experts=1)
    remove_experts(dense_twin, "mlp", [[0], None])
    assert dense_twin.config.mlp_kept_experts is None


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_removing_experts_that_no_token_keeps_changes_nothing(tiny_model, data):
    name = data.draw(st.sampled_from(["top_k", "threshold", "top_p"]))
    value = {"k": 1} if name == "top_k" else {"threshold": 1.2} if name == "threshold" else {"top_p": 0.4}
    policy = {"policy": name, **value}
    if data.draw(st.booleans()):
        policy["score_weights"] = [0.4, 1.0, 2.0, 1.1]
    model = tiny_model(data.draw(st.integers(0, 2)), num_experts=4)
    set_routing(model, "mlp", policy)
    outputs = model(IDS)
    kept = []
    for logits in outputs.router_logits:
        used = keep_experts(logits.flatten(0, 1).softmax(-1), model.config.mlp_routing[0]).any(0)
        unneeded = (~used).nonzero().flatten().tolist()
        gone = data.draw(st.sets(st.sampled_from(unneeded))) if unneeded else set()
        kept.append([expert for expert in range(4) if expert not in gone])
    remove_experts(model, "mlp", kept)
    torch.testing.assert_close(model(IDS).logits, outputs.logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("part", "kept", "message"),
    [
        (
            "mlp",
            [[0, 3], [1]],
            r"mlp_kept_experts\[0\]: expert 3 was removed before; present are \[0, 1, 2\]",
        ),
        ("mlp", [[0], []], r"mlp_kept_experts\[1\] is empty; every layer keeps at least one"),
        ("mlp", [[2, 1], None], r"mlp_kept_experts\[0\]: expert 1 stands after 2"),
        ("mlp", [[1, 1], None], r"mlp_kept_experts\[0\]: expert 1 stands after 1"),
        ("mlp", [[0], [4]], r"mlp_kept_experts\[1\]: expert 4; it must be an integer from 0 to 3"),
        ("mlp", [[0]], "mlp_kept_experts: 1 entries for 2 layers"),
        ("mlp", [[0, 1], [0]], r"mlp_routing\[1\]: k is 2, and 1 of the layer's 4 experts remain"),
        ("attention", [[0], [2]], r"attention_kept_experts\[1\]: expert 2"),
        ("experts", [[0], [0]], "part is 'experts'"),
    ],
)
def test_refusals_change_nothing(tiny_model, part, kept, message):
    model = reduced(tiny_model(**MOA, mlp_routing={"policy": "top_k", "k": 2}), [[0, 1, 2], None])
    config, parameters = copy.deepcopy(model.config.to_dict()), list(model.parameters())
    with pytest.raises(UserError, match=message) as caught:
        remove_experts(model, part, kept)
    assert "\n" not in str(caught.value)
    assert model.config.to_dict() == config
    assert all(before is after for before, after in zip(parameters, model.parameters()))


def test_experts_in_int8_are_refused(tiny_model):
    model = tiny_model(dtype=torch.float32)
    quantize_int8(model)
    config = copy.deepcopy(model.config.to_dict())
    with pytest.raises(UserError, match="in int8; remove experts first"):
        remove_experts(model, "mlp", KEPT)
    assert model.config.to_dict() == config


def test_policies_are_checked_against_what_remains(tiny_model):
    model = reduced(tiny_model())
    for k, layer in ((4, 0), (2, 1)):
        policies = [{"policy": "dense"}, {"policy": "dense"}]
        policies[layer] = {"policy": "top_k", "k": k}
        with pytest.raises(UserError, match=rf"mlp_routing\[{layer}\]: k is {k}"):
            set_routing(model, "mlp", policies)
        with pytest.raises(UserError, match="remain"), use_routing(model, mlp=policies):
            pass
    set_routing(model, "mlp", [{"policy": "top_k", "k": 3}, {"policy": "threshold", "threshold": 1.0}])
    # as many as are stored, or a single one, is every one: the wide path runs them
    assert [model.config.is_dense_layer("mlp", layer) for layer in (0, 1)] == [True, True]
    set_routing(model, "mlp", {"policy": "top_k", "k": 1})
    assert [model.config.is_dense_layer("mlp", layer) for layer in (0, 1)] == [False, True]


MODELS = {
    "plain": {},
    "square_moa": SQUARE_MOA,
    "gelu_untied": {"mlp_type": "gelu", "tie_word_embeddings": False},
}


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_save_and_load(tiny_model, tmp_path, overrides, dtype):
    model = tiny_model(dtype=dtype, **overrides)
    save_pretrained(model, tmp_path / "whole", None)
    attention = [[1], None] if "num_attention_experts" in overrides else None
    reduced(model, attention=attention)
    set_routing(model, "mlp", POLICIES)
    save_pretrained(model, tmp_path / "model", None)
    on_disk = load_file(tmp_path / "model" / "model.safetensors")
    assert on_disk["model.layers.0.mlp.experts.down_proj"].shape[0] == 3
    whole_bytes, bytes_now = ((tmp_path / n / "model.safetensors").stat().st_size for n in ("whole", "model"))
    assert bytes_now < whole_bytes
    expected = model(IDS).logits
    for loaded in (
        DSMoEForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto"),
        load_pretrained(tmp_path / "model", dtype)[0],
    ):
        assert loaded.config.mlp_kept_experts == KEPT
        assert loaded.config.attention_kept_experts == (None if attention is None else [[1], [0, 1]])
        assert loaded.config.mlp_routing == POLICIES
        assert loaded.dtype == dtype and not list(loaded.buffers())
        assert set(loaded.state_dict()) == set(model.state_dict())
        assert torch.equal(loaded(IDS).logits, expected)
    save_pretrained(loaded, tmp_path / "again", None)
    again, first = (tmp_path / name for name in ("again", "model"))
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert read_json(again / "config.json") == read_json(first / "config.json")


def test_weights_of_other_experts_are_refused(tiny_model, tmp_path):
    save_pretrained(reduced(tiny_model(dtype=torch.float32)), tmp_path / "model", None)
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"mlp_kept_experts"', '"unknown"'))
    with pytest.raises(UserError, match=r"mismatched keys: .*mlp\.experts") as caught:
        load_pretrained(tmp_path / "model", torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("batch", [1, 2])
def test_generation_with_cache_equals_without(tiny_model, batch):
    model = reduced(tiny_model(**MOA), attention=[None, [1]])
    set_routing(model, "mlp", POLICIES)
    set_routing(model, "attention", {"policy": "top_p", "top_p": 0.5, "score_weights": [0.7, 1.3]})
    ids = IDS[:batch]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    with_cache, without = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert with_cache.shape == (batch, 14) and torch.equal(with_cache, without)


def test_fine_tuning_after_inference(tiny_model):
    """Numbers of the config become tensors once; a first use in inference mode must not spoil training."""
    model = reduced(tiny_model(**MOA), attention=[[0], [0]])
    set_routing(model, "mlp", POLICIES)
    with torch.inference_mode():
        model(IDS)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(
            model(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.parameters())
