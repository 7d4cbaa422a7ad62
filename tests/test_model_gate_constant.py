"""Gates with a constant part: c + (1 - c) * g for kept experts, 0 for dropped ones, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_experts import POLICIES, assert_same, kept_by_rule, loop_over_experts, tokens
from test_sparsify_compare import make_batches

from dsmoe import DSMoEConfig
from dsmoe.checkpoint import save_pretrained
from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.errors import UserError
from dsmoe.export import export
from dsmoe.model import remove_experts
from dsmoe.model.generation import Decoder, backend
from dsmoe.model.int8 import quantize_int8
from dsmoe.model.routing import gate_values, keep_experts, route
from dsmoe.sparsify.compare import reference_policies
from dsmoe.sparsify.sites import find_sites, output_norms
from dsmoe.sparsify.suffix import run_layers

C = 0.3
NORMALIZATIONS = ["softmax", "l2", "renormalized"]
GENERATED = {
    "dense": {},
    "threshold": {"mlp_routing": {"policy": "threshold", "threshold": 0.9}, "gate_normalization": "l2"},
    "top_k": {"mlp_routing": {"policy": "top_k", "k": 2}, "gate_normalization": "renormalized"},
    "moa": {
        "num_attention_experts": 2,
        "qk_norm": "none",
        "mlp_routing": {"policy": "top_p", "top_p": 0.7},
        "attention_routing": {"policy": "top_k", "k": 1},
    },
    "removed": {"mlp_kept_experts": [[0, 3], None], "mlp_routing": {"policy": "threshold", "threshold": 0.9}},
}


def naive_gates(probs_TN, kept_TN, normalization, scale):
    """Row by row, from the docstring of DSMoEConfig."""
    rows = []
    for probs, kept in zip(probs_TN, kept_TN):
        below = {
            "softmax": 1.0,
            "l2": probs.square().sum().sqrt(),
            "renormalized": sum(p for p, keeps in zip(probs, kept) if keeps),
        }[normalization]
        rows.append(
            torch.stack(
                [C + (1 - C) * scale * p / below if keeps else 0 * p for p, keeps in zip(probs, kept)]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("policy", POLICIES[:7], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_layer_equals_the_loop(tiny_model, normalization, policy):
    """Dense and sparse paths, outputs and gradients."""
    model = tiny_model(gate_normalization=normalization, mlp_routing=policy, gate_constant=C)
    mlp, x = model.model.layers[1].mlp, tokens(8)
    probs = (x @ mlp.router.weight.T).softmax(-1)
    kept = torch.tensor([[e in row for e in range(4)] for row in kept_by_rule(probs.detach(), policy)])
    gates = naive_gates(probs, kept, normalization, model.config.mlp_gate_scale)
    expected = loop_over_experts(x, gates, kept, mlp.experts)
    # a single kept expert's renormalised gate is constant
    alone = normalization == "renormalized" and bool((kept.sum(-1) == 1).all())
    parameters = [p for name, p in mlp.named_parameters() if not (alone and "router" in name)]
    assert_same(mlp(x.view(2, 4, 32))[0].view(8, 32), expected, [x, *parameters])


@settings(max_examples=60, deadline=None)
@given(
    constant=st.floats(0.01, 0.99),
    normalization=st.sampled_from(NORMALIZATIONS),
    experts=st.integers(2, 8),
    threshold=st.floats(0, 2),
    seed=st.integers(0, 999),
)
def test_gates_lie_between(constant, normalization, experts, threshold, seed):
    """All experts: at least c; a mask: the same or, dropped, exactly 0; and linear in c."""
    draws = torch.Generator().manual_seed(seed)
    probs = torch.randn(5, experts, generator=draws, dtype=torch.float64).mul(3).softmax(-1)
    every = gate_values(probs, None, normalization, 1.5, None, constant)
    assert (every >= constant).all()
    mask = keep_experts(probs, {"policy": "threshold", "threshold": threshold})
    kept = gate_values(probs, mask, normalization, 1.5, None, constant)
    assert (kept[~mask] == 0).all() and (kept[mask] >= constant).all()
    if normalization != "renormalized":
        torch.testing.assert_close(kept, every * mask)
    plain = gate_values(probs, mask, normalization, 1.5)
    torch.testing.assert_close(kept, (constant + (1 - constant) * plain) * mask)
    stored = sorted({0, experts - 1})
    cut = gate_values(probs, None, normalization, 1.5, stored, constant)
    torch.testing.assert_close(
        cut, constant + (1 - constant) * gate_values(probs, None, normalization, 1.5, stored)
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_uniform_routers_still_give_the_twin(tiny_model, normalization):
    ids = torch.arange(10)[None]
    made = {"gate_normalization": normalization, "router_initializer_range": 0.0}
    twin = tiny_model(kind="dense", num_experts=1)(ids).logits
    torch.testing.assert_close(tiny_model(**made, gate_constant=C)(ids).logits, twin)


def test_attention_experts_have_none(tiny_config):
    config = tiny_config(num_attention_experts=2, qk_norm="none", gate_constant=C)
    probs = torch.tensor([[0.9, 0.1]])
    torch.testing.assert_close(route(probs, config, "attention", 0)[0], 2 * probs)
    probs = torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    torch.testing.assert_close(route(probs, config, "mlp", 0)[0], C + (1 - C) * 4 * probs)


@pytest.mark.parametrize("overrides", GENERATED.values(), ids=GENERATED)
@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_decoding_equals_the_forward_pass(tiny_model, overrides, int8):
    model = tiny_model(dtype=torch.float32, **overrides, gate_constant=C)
    plain = tiny_model(dtype=torch.float32, **overrides)
    ids = torch.randint(1, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    if int8:
        model, plain = quantize_int8(model, True), quantize_int8(plain, True)
    with torch.no_grad():
        expected, without = (one(ids, use_cache=False).logits for one in (model, plain))
    assert (expected - without).norm() > 1e-2 * expected.norm()
    for kind in ["torch", "cpp"] if backend.is_available() else ["torch"]:
        made = Decoder(model, 9, 2, kind)
        rows = [made.prefill(ids[:, :4]).clone()]
        rows += [made.step(ids[:, position]).clone() for position in range(4, 9)]
        error = (torch.stack(rows, 1) - expected[:, 3:]).abs().max() / expected.abs().max()
        assert error < 1e-4, kind


def test_removing_experts_that_nobody_keeps_changes_nothing(tiny_model):
    policy = {"policy": "top_k", "k": 2, "score_weights": [1.0, 1.0, 1e-3, 1.0]}
    model, ids = tiny_model(mlp_routing=policy, gate_constant=C), torch.arange(12)[None]
    probs = [logits.flatten(0, 1).softmax(-1) for logits in model(ids).router_logits]
    kept = [
        keep_experts(p, model.config.routing("mlp", layer)).any(0).nonzero()[:, 0].tolist()
        for layer, p in enumerate(probs)
    ]
    assert any(len(experts) < 4 for experts in kept)
    before = model(ids).logits
    remove_experts(model, "mlp", kept)
    torch.testing.assert_close(model(ids).logits, before)


def test_output_norms_are_weighted_by_the_whole_gate(tiny_model):
    """`dsmoe sparsify` divides by the gate that the output was multiplied with."""
    model = tiny_model(gate_constant=C)
    batch = make_batches(1)[0]
    reference = reference_policies(model)
    found = output_norms(model, [batch], find_sites(model, [batch], reference), reference)
    mlp, seen = model.model.layers[1].mlp, {}
    hook = mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        run_layers(model, batch)
        hook.remove()
        x_TD = seen["x"][batch["attention_mask"].bool()]
        gates_TN = C + (1 - C) * 4 * mlp.router(x_TD).softmax(-1)
        norms = [mlp.experts(x_TD, row.expand(len(x_TD), 4)).norm(dim=-1) for row in torch.eye(4).double()]
    expected = [float((norm * gate).sum() / gate.sum()) for norm, gate in zip(norms, gates_TN.T)]
    assert found[1] == pytest.approx([4 * norm / sum(expected) for norm in expected], abs=2e-3)


def test_it_is_saved_and_cannot_be_exported(tmp_path, tiny_model):
    made = {"dtype": torch.float32, "mlp_routing": {"policy": "top_k", "k": 2}, "gate_constant": C}
    for target, qk_norm in (("olmoe", "full"), ("qwen2moe", "none"), ("gguf", "full")):
        model = tiny_model(**made, qk_norm=qk_norm)
        save_pretrained(model, tmp_path / target, None)
        with pytest.raises(UserError, match=r"gate_constant is 0\.3; the gates of .* have no constant part"):
            export(tmp_path / target, target, tmp_path / "out.gguf")
    again = load_pretrained(tmp_path / "olmoe", torch.float32)[0].eval()
    ids = torch.arange(7)[None]
    assert again.config.gate_constant == C
    torch.testing.assert_close(again(ids).logits, tiny_model(**made)(ids).logits)


@pytest.mark.parametrize("constant", [-0.1, 1.0, 2.0, float("nan")])
def test_refused(constant):
    with pytest.raises(UserError, match="gate_constant"):
        DSMoEConfig(gate_constant=constant)
