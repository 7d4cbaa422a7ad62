"""Properties of routing policies and gates."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsmoe.errors import UserError
from dsmoe.model import set_routing, use_routing
from dsmoe.model.routing import gate_values, keep_experts

PROPERTY = settings(max_examples=60, deadline=None)


@st.composite
def probabilities(draw):
    """Softmax of [T, N] logits, from flat to peaked, sometimes with ties."""
    tokens, experts = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    values = st.floats(-8, 8, width=16) if draw(st.booleans()) else st.integers(-2, 2).map(float)
    logits = draw(st.lists(values, min_size=tokens * experts, max_size=tokens * experts))
    return torch.tensor(logits, dtype=torch.float64).view(tokens, experts).softmax(-1)


@st.composite
def policies(draw, num_experts):
    name = draw(st.sampled_from(["dense", "top_k", "threshold", "top_p", "threshold_top_k"]))
    policy = {"policy": name}
    if "threshold" in name:
        policy["threshold"] = draw(st.floats(0, num_experts))
    if name == "top_p":
        policy["top_p"] = draw(st.floats(0, 1))
    if name == "top_k" or name == "threshold_top_k":
        policy["k"] = draw(st.integers(1, num_experts))
    if name == "threshold_top_k" and draw(st.booleans()):
        policy["k"] = None
    return policy


@PROPERTY
@given(probabilities(), st.data())
def test_the_best_expert_is_kept_and_better_ones_first(probs, data):
    kept = keep_experts(probs, data.draw(policies(probs.shape[1])))
    assert kept.dtype == torch.bool and kept.any(-1).all()
    for row, keeps in zip(probs, kept):
        assert row[keeps].max() == row.max()
        if not keeps.all():
            assert row[keeps].min() >= row[~keeps].max()


def weighted(draw, policy, num_experts):
    """The policy with score weights, at times."""
    if policy["policy"] == "dense" or not draw(st.booleans()):
        return policy
    weights = st.lists(st.floats(0.1, 10), min_size=num_experts, max_size=num_experts)
    return {**policy, "score_weights": draw(weights)}


@PROPERTY
@given(probabilities(), st.data())
def test_removed_experts_are_never_kept_and_the_best_stored_one_always(probs, data):
    num_experts = probs.shape[1]
    stored = sorted(data.draw(st.sets(st.integers(0, num_experts - 1), min_size=1)))
    policy = weighted(data.draw, data.draw(policies(num_experts)), num_experts)
    if policy.get("k"):
        policy["k"] = min(policy["k"], len(stored))
    kept = keep_experts(probs, policy, stored)
    assert kept.shape == probs.shape and kept.dtype == torch.bool
    removed = [expert for expert in range(num_experts) if expert not in stored]
    assert not kept[:, removed].any()
    scores = probs * torch.tensor(policy.get("score_weights", [1.0] * num_experts), dtype=torch.float64)
    for row, keeps in zip(scores, kept):
        assert row[keeps].max() == row[stored].max()
        assert policy["policy"] != "dense" or keeps[stored].all()
    if policy["policy"] in ("dense", "threshold", "top_p"):
        # what a rule keeps of all, it keeps of the stored ones, and at most it adds where too little is left
        looser = {**policy, "top_p": policy["top_p"] - 1e-9} if "top_p" in policy else policy
        assert not (keep_experts(probs, looser) & ~kept)[:, stored].any()
    everything = keep_experts(probs, policy)
    assert torch.equal(keep_experts(probs, policy, list(range(num_experts))), everything)


@PROPERTY
@given(probabilities(), st.data())
def test_weights_choose_as_if_the_scores_were_the_probabilities(probs, data):
    """Weights whose products sum to one per token: a rule on s is the plain rule on a router that gives s."""
    num_experts = probs.shape[1]
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=num_experts, max_size=num_experts))
    scores = probs * torch.tensor(weights, dtype=torch.float64)
    shares = scores / scores.sum(-1, keepdim=True)
    top_p, k = data.draw(st.floats(0.05, 0.95)), data.draw(st.integers(1, num_experts))
    for policy in ({"policy": "top_p", "top_p": top_p}, {"policy": "top_k", "k": k}):
        kept, wanted = keep_experts(probs, {**policy, "score_weights": weights}), keep_experts(shares, policy)
        ranked = shares.sort(-1).values
        clear = (ranked.diff(dim=-1) > 1e-9).all(-1)
        clear &= ((ranked.flip(-1).cumsum(-1) - top_p).abs() > 1e-9).all(-1)
        assert torch.equal(kept[clear], wanted[clear])


@PROPERTY
@given(probabilities(), st.data())
def test_one_threshold_per_expert(probs, data):
    num_experts = probs.shape[1]
    limits = data.draw(st.lists(st.floats(0, 3), min_size=num_experts, max_size=num_experts))
    policy = weighted(data.draw, {"policy": "threshold", "threshold": limits}, num_experts)
    kept = keep_experts(probs, policy)
    for row, keeps in zip(probs, kept):
        for expert in range(num_experts):
            weight = policy.get("score_weights", [1.0] * num_experts)[expert]
            score = num_experts * row[expert].item() * weight
            if score > limits[expert] + 1e-9:
                assert keeps[expert]
            elif score < limits[expert] - 1e-9 and keeps[expert]:
                weights = policy.get("score_weights", [1.0] * num_experts)
                scores = row * torch.tensor(weights, dtype=torch.float64)
                assert scores[expert] == scores.max()
    # equal ones are one
    value = data.draw(st.floats(0, 3))
    one, many = ({"policy": "threshold", "threshold": t} for t in (value, [value] * num_experts))
    assert torch.equal(keep_experts(probs, one), keep_experts(probs, many))


def test_top_p_of_stored_experts_is_a_share_of_all():
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    for stored, top_p, expected in (
        ([0, 1, 3], 0.75, [0, 1]),
        ([0, 1, 3], 0.83, [0, 1, 3]),  # of the stored alone, 0 and 1 would be 94%
        ([2, 3], 0.9, [2, 3]),
        ([2, 3], 0.1, [2]),
    ):
        kept = keep_experts(probs, {"policy": "top_p", "top_p": top_p}, stored)
        assert kept[0].nonzero().flatten().tolist() == expected


def test_batch_dependent_k_is_at_most_what_is_stored():
    probs = torch.full((3, 4), 0.25, dtype=torch.float64)
    policy = {"policy": "threshold_top_k", "threshold": 0.1, "k": None}
    assert keep_experts(probs, policy, [1, 3]).sum(-1).tolist() == [2, 2, 2]
    assert keep_experts(probs[:0], policy, [1, 3]).shape == (0, 4)


@PROPERTY
@given(probabilities(), st.floats(0.1, 20), st.data())
def test_gates_of_stored_experts(probs, scale, data):
    num_experts = probs.shape[1]
    stored = sorted(data.draw(st.sets(st.integers(0, num_experts - 1), min_size=1)))
    mask = data.draw(st.sampled_from([None, {"policy": "top_k", "k": 1}]))
    mask = None if mask is None else keep_experts(probs, mask, stored)
    cut = None if mask is None else mask[:, stored]
    as_mask = torch.zeros_like(probs, dtype=torch.bool)
    as_mask[:, stored] = True
    for name in ("softmax", "l2", "renormalized"):
        # removing an expert is what masking it is
        expected = gate_values(probs, as_mask if mask is None else mask, name, scale)[:, stored]
        torch.testing.assert_close(gate_values(probs, cut, name, scale, stored), expected)


@PROPERTY
@given(probabilities(), st.data())
def test_top_k_keeps_k(probs, data):
    k = data.draw(st.integers(1, probs.shape[1]))
    for policy in ({"policy": "top_k", "k": k}, {"policy": "threshold_top_k", "threshold": 0.5, "k": k}):
        assert (keep_experts(probs, policy).sum(-1) == k).all()


@PROPERTY
@given(probabilities(), st.floats(0, 9))
def test_threshold_is_the_rule_plus_the_best(probs, threshold):
    kept = keep_experts(probs, {"policy": "threshold", "threshold": threshold})
    rule = probs * probs.shape[1] > threshold
    for keeps, wanted in zip(kept, rule):
        assert torch.equal(keeps, wanted) if wanted.any() else keeps.sum() == 1


@PROPERTY
@given(probabilities(), st.floats(0.01, 0.99))
def test_top_p_is_the_smallest_set(probs, top_p):
    kept = keep_experts(probs, {"policy": "top_p", "top_p": top_p})
    for row, keeps in zip(probs, kept):
        assert row[keeps].sum() >= top_p - 1e-12
        assert row[keeps].sum() - row[keeps].min() < top_p + 1e-12


@PROPERTY
@given(probabilities(), st.floats(0, 9))
def test_batch_dependent_k_is_the_rounded_mean(probs, threshold):
    mean = keep_experts(probs, {"policy": "threshold", "threshold": threshold}).sum(-1).double().mean().item()
    assume(abs(mean % 1 - 0.5) > 1e-6)
    kept = keep_experts(probs, {"policy": "threshold_top_k", "threshold": threshold, "k": None})
    assert (kept.sum(-1) == round(mean)).all()


@PROPERTY
@given(probabilities(), st.floats(0.1, 20), st.data())
def test_gate_identities(probs, scale, data):
    kept = keep_experts(probs, data.draw(policies(probs.shape[1])))
    ones, scales = torch.ones(len(probs), dtype=torch.float64), torch.full((len(probs),), scale).double()
    for mask in (None, kept):
        gates = {name: gate_values(probs, mask, name, scale) for name in ("softmax", "l2", "renormalized")}
        for values in gates.values():
            assert mask is None or (values[~mask] == 0).all()
        keeps = torch.ones_like(kept) if mask is None else mask
        torch.testing.assert_close(gates["softmax"][keeps], (scale * probs)[keeps])
        torch.testing.assert_close(gates["renormalized"].sum(-1), scales)
    torch.testing.assert_close(gate_values(probs, None, "l2", scale).norm(dim=-1), scales)
    torch.testing.assert_close(gate_values(probs, None, "softmax", 1.0).sum(-1), ones)
    # the norm is over all experts: a mask changes no gate that stays
    torch.testing.assert_close(gates["l2"], gate_values(probs, None, "l2", scale) * kept)


def test_set_and_use_routing(tiny_model):
    model = tiny_model(num_attention_experts=2, qk_norm="none")
    dense = [{"policy": "dense"}] * 2
    with use_routing(model, mlp={"policy": "top_k", "k": 2}, attention={"policy": "top_k", "k": 1}):
        assert model.config.mlp_routing == [{"policy": "top_k", "k": 2}] * 2
        assert model.config.attention_routing == [{"policy": "top_k", "k": 1}] * 2
    assert model.config.mlp_routing == model.config.attention_routing == dense
    with pytest.raises(RuntimeError), use_routing(model, mlp={"policy": "top_k", "k": 2}):
        raise RuntimeError
    assert model.config.mlp_routing == dense
    with pytest.raises(UserError, match=r"mlp_routing\[0\]: k is 5"):
        set_routing(model, "mlp", {"policy": "top_k", "k": 5})
    per_layer = [{"policy": "top_k", "k": 1}, {"policy": "dense"}]
    set_routing(model, "mlp", per_layer)
    assert model.config.mlp_routing == per_layer
    with pytest.raises(UserError, match="1 policies for 2 layers"):
        set_routing(model, "mlp", per_layer[:1])


def test_layers_follow_their_own_policy(tiny_model):
    model = tiny_model(mlp_routing=[{"policy": "top_k", "k": 1}, {"policy": "dense"}])
    x = torch.ones(1, 3, 32, dtype=torch.float64)
    first, second = (layer.mlp for layer in model.model.layers)
    with use_routing(model, mlp={"policy": "dense"}):
        dense = first(x)[0], second(x)[0]
    assert not torch.allclose(first(x)[0], dense[0])
    assert torch.equal(second(x)[0], dense[1])
