"""What of the plugin needs no vLLM: registration, the choice of the experts' code, routing into fused experts."""

import importlib.metadata
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, use_routing
from dsmoe.model.routing import route
from dsmoe.serving import vllm_plugin
from dsmoe.serving.experts_path import VARIABLE, experts_path
from dsmoe.serving.fused_experts import chosen, route_into_fused
from dsmoe.serving.limits import check_engine, check_servable
from dsmoe.serving.vllm_plugin import ARCHITECTURE, MODEL, register

TOP_2 = {"policy": "top_k", "k": 2}


def test_registration(monkeypatch):
    models = {}
    registry = SimpleNamespace(get_supported_archs=lambda: set(models), register_model=models.__setitem__)
    stub = ModuleType("vllm")
    stub.ModelRegistry = registry
    monkeypatch.setitem(sys.modules, "vllm", stub)
    register()
    register()
    assert models == {ARCHITECTURE: MODEL}
    assert DSMoEForCausalLM.__name__ == ARCHITECTURE  # what config.json names


def test_entry_point():
    entries = importlib.metadata.entry_points(group="vllm.general_plugins")
    found = [entry for entry in entries if entry.name == "dsmoe"]
    if not found:
        pytest.skip("installed before the entry point was there")
    assert found[0].load() is register


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ({"mlp_routing": TOP_2}, "cpu", "own"),
        ({"mlp_routing": TOP_2}, "cuda", "fused"),
        ({"mlp_routing": {"policy": "threshold", "threshold": 1.0}}, "cuda", "own"),
        ({"mlp_routing": TOP_2, "mlp_type": "gelu"}, "cuda", "own"),
        ({"mlp_routing": TOP_2, "mlp_kept_experts": [[0, 1, 2], None]}, "cuda", "own"),
        ({"kind": "dense", "num_experts": 1}, "cuda", "own"),
    ],
)
def test_auto(tiny_config, monkeypatch, overrides, device, expected):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert experts_path(tiny_config(**overrides), device) == expected
    monkeypatch.setenv(VARIABLE, "own")
    assert experts_path(tiny_config(**overrides), device) == "own"
    monkeypatch.setenv(VARIABLE, "fused")
    if expected == "own" and device == "cuda":
        with pytest.raises(UserError, match="fused can't run this model"):
            experts_path(tiny_config(**overrides), device)
    else:
        assert experts_path(tiny_config(**overrides), device) == "fused"


def test_unknown_choice(tiny_config, monkeypatch):
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UserError, match="auto, own, fused"):
        experts_path(tiny_config(), "cpu")


def test_policies_over_the_batch_are_refused(tiny_config):
    policy = {"policy": "threshold_top_k", "threshold": 1.0}
    check_servable(tiny_config(mlp_routing={**policy, "k": 2}))
    with pytest.raises(UserError, match=r"mlp_routing\[0\]"):
        check_servable(tiny_config(mlp_routing=policy))


@pytest.mark.parametrize(
    ("where", "name", "value", "says"),
    [
        (
            "parallel_config",
            "tensor_parallel_size",
            2,
            "tensor_parallel_size is 2; a dsmoe model is served with 1",
        ),
        ("parallel_config", "pipeline_parallel_size", 4, "pipeline_parallel_size is 4"),
        ("parallel_config", "enable_expert_parallel", True, "enable_expert_parallel is True"),
        ("model_config", "quantization", "fp8", "quantization is fp8"),
        ("model_config", "dtype", torch.float16, "dtype is float16"),
        ("self", "lora_config", object(), "enable_lora is True"),
    ],
)
def test_engines_arguments(tiny_config, where, name, value, says):
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "enable_expert_parallel": False}
    given = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=tiny_config(), quantization=None, dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(**parallel),
        device_config=SimpleNamespace(device_type="cpu"),
        lora_config=None,
    )
    check_engine(given)
    setattr(given if where == "self" else getattr(given, where), name, value)
    with pytest.raises(UserError, match=says):
        check_engine(given)


@pytest.mark.parametrize("normalization", ["softmax", "l2", "renormalized"])
def test_chosen_experts_are_those_of_the_policy(tiny_config, normalization):
    config = tiny_config(mlp_routing=TOP_2, gate_normalization=normalization)
    probs = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    gates, mask = route(probs, config, "mlp", 0)
    ids, weights = chosen(gates, mask, 2)
    assert torch.equal(torch.zeros_like(mask).scatter(1, ids, True), mask)
    assert torch.equal(torch.zeros_like(gates).scatter(1, ids, weights), gates)


@torch.no_grad()
def test_routing_into_fused_experts(tiny_model):
    """With experts of vLLM's form in the place of ours the layer computes the same."""
    model = tiny_model(mlp_routing=TOP_2)
    mlp = model.model.layers[0].mlp
    ours = mlp.experts
    x = torch.randn(2, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected, logits = mlp(x)

    class Fused(torch.nn.Module):
        def forward(self, x_TD, ids_TK, weights_TK):
            gates = weights_TK.new_zeros(x_TD.shape[0], 4).scatter(1, ids_TK, weights_TK)
            return ours(x_TD, gates, gates > 0)

    mlp.experts = Fused()
    route_into_fused(mlp)
    actual, same_logits = mlp(x)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(logits, same_logits)


@torch.no_grad()
def test_all_heads_give_the_same_as_kept_heads(tiny_model):
    """What vLLM runs in the place of the kept heads."""
    heads = {"num_attention_experts": 2, "qk_norm": "per_head"}
    model = tiny_model(**heads, attention_routing={"policy": "threshold", "threshold": 1.0})
    ids = torch.arange(12).view(1, -1)
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.runs_all_heads = True
    torch.testing.assert_close(model(ids).logits, expected)
    with use_routing(model, attention={"policy": "dense"}):
        assert not torch.allclose(model(ids).logits, expected)


@pytest.mark.parametrize(
    ("overrides", "device", "eager"),
    [
        ({"mlp_routing": {"policy": "threshold", "threshold": 1.0}}, "cuda", True),
        ({"mlp_routing": {"policy": "threshold", "threshold": 1.0}}, "cpu", False),
        ({"mlp_routing": TOP_2}, "cuda", False),
        ({}, "cuda", False),
        (
            {
                "num_attention_experts": 4,
                "num_key_value_heads": 1,
                "qk_norm": "per_head",
                "attention_routing": TOP_2,
            },
            "cuda",
            True,
        ),
    ],
)
def test_models_that_no_graph_can_hold_run_eagerly(
    tiny_config, monkeypatch, capsys, overrides, device, eager
):
    """Which experts tokens keep is read by the host, and a graph that was captured has none."""
    monkeypatch.delenv(VARIABLE, raising=False)
    table, module = {}, ModuleType("vllm.model_executor.models.config")
    module.MODELS_CONFIG_MAP, module.VerifyAndUpdateConfig = table, object
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    vllm_plugin._refuse_early()
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "enable_expert_parallel": False}
    model = SimpleNamespace(
        hf_config=tiny_config(**overrides), quantization=None, dtype=torch.bfloat16, enforce_eager=False
    )
    given = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(**parallel),
        device_config=SimpleNamespace(device_type=device),
        lora_config=None,
    )
    table[ARCHITECTURE].verify_and_update_config(given)
    assert model.enforce_eager is eager
    assert ("without CUDA graphs" in capsys.readouterr().err) is eager
