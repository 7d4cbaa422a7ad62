"""The mixture of MLP experts against a naive loop over tokens and experts, outputs and gradients, in float64."""

import math

import pytest
import torch
from torch.nn import functional

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
POLICIES = [
    {"policy": "dense"},
    {"policy": "top_k", "k": 1},
    {"policy": "top_k", "k": 3},
    {"policy": "threshold", "threshold": 0.9},
    {"policy": "threshold", "threshold": 4.0},
    {"policy": "top_p", "top_p": 0.6},
    {"policy": "threshold_top_k", "threshold": 0.9, "k": 2},
    {"policy": "threshold_top_k", "threshold": 0.9, "k": None},
]
NUM_TOKENS = 9


def one_expert(x_D, up_HD, down_FD, mlp_type):
    if mlp_type == "swiglu":
        gate_F, up_F = (up_HD @ x_D).chunk(2)
        return (functional.silu(gate_F) * up_F) @ down_FD
    return functional.gelu(up_HD @ x_D) @ down_FD


def loop_over_experts(x_TD, gates_TN, kept_TN, experts):
    rows = []
    for x_D, gates_N, kept_N in zip(x_TD, gates_TN, kept_TN):
        row = torch.zeros_like(x_D)
        for expert, keeps in enumerate(kept_N):
            if keeps:
                up, down = experts.input_proj[expert], experts.down_proj[expert]
                row = row + gates_N[expert] * one_expert(x_D, up, down, experts.mlp_type)
        rows.append(row)
    return torch.stack(rows)


def kept_by_rule(probs_TN, policy):
    """Sets of kept experts, token by token, as the table in `dsmoe.config.routing` words it."""
    name, num_experts = policy["policy"], probs_TN.shape[1]
    rows = [row.tolist() for row in probs_TN]
    ranked = [sorted(range(num_experts), key=lambda e, row=row: -row[e]) for row in rows]
    above = [
        {e for e in range(num_experts) if num_experts * row[e] > policy.get("threshold", 0.0)} | {order[0]}
        for row, order in zip(rows, ranked)
    ]
    if name == "dense":
        return [set(range(num_experts))] * len(rows)
    if name == "threshold":
        return above
    if name == "top_p":
        kept = []
        for row, order in zip(rows, ranked):
            size = next(s for s in range(1, 99) if sum(row[e] for e in order[:s]) >= policy["top_p"])
            kept.append(set(order[:size]))
        return kept
    k = policy["k"]
    if k is None:
        k = round(sum(len(experts) for experts in above) / len(above))
    return [set(order[:k]) for order in ranked]


def naive_mlp(mlp, x_TD, policy):
    config, router = mlp.config, mlp.router
    if config.router_type == "mlp":
        logits_TN = functional.silu(x_TD @ router.in_proj.T) @ router.out_proj.T
    else:
        logits_TN = x_TD @ router.weight.T
    probs_TN = logits_TN.exp() / logits_TN.exp().sum(-1, keepdim=True)
    kept = kept_by_rule(probs_TN.detach(), policy)
    kept_TN = torch.tensor([[e in row for e in range(config.num_experts)] for row in kept])
    below = {
        "softmax": lambda: torch.ones(len(x_TD), 1),
        "l2": lambda: probs_TN.square().sum(-1, keepdim=True).sqrt(),
        "renormalized": lambda: (probs_TN * kept_TN).sum(-1, keepdim=True),
    }[config.gate_normalization]()
    return loop_over_experts(x_TD, config.mlp_gate_scale * probs_TN / below, kept_TN, mlp.experts)


def assert_same(actual, expected, inputs):
    torch.testing.assert_close(actual, expected, **CLOSE)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    wanted = torch.autograd.grad(expected, inputs, cotangent, allow_unused=True)
    for got, want in zip(torch.autograd.grad(actual, inputs, cotangent, allow_unused=True), wanted):
        assert want is not None and want.abs().sum() > 0
        torch.testing.assert_close(got, want, **CLOSE)


def tokens(count=NUM_TOKENS, size=32, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_experts_equal_the_loop(tiny_model, mlp_type, sparse):
    experts = tiny_model(mlp_type=mlp_type).model.layers[0].mlp.experts
    x, gates = tokens(), tokens(size=4, seed=3)
    kept = torch.ones(NUM_TOKENS, 4, dtype=torch.bool)
    if sparse:
        kept = torch.rand(NUM_TOKENS, 4, generator=torch.Generator().manual_seed(4)) < 0.5
        kept[:, 1] |= ~kept.any(-1)
        kept[:, 3] = False  # an expert without any token
    inputs = (x, gates, experts.input_proj, experts.down_proj)
    assert_same(
        experts(x, gates, kept if sparse else None), loop_over_experts(x, gates, kept, experts), inputs
    )


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_twin_without_gates(tiny_model, mlp_type):
    experts = tiny_model(kind="dense", num_experts=1, mlp_type=mlp_type).model.layers[0].mlp.experts
    x, ones = tokens(), torch.ones(NUM_TOKENS, 1)
    inputs = (x, experts.input_proj, experts.down_proj)
    assert_same(experts(x, None), loop_over_experts(x, ones, ones, experts), inputs)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("normalization", ["softmax", "l2", "renormalized"])
@pytest.mark.parametrize(("mlp_type", "router_hidden"), [("swiglu", 0), ("gelu", 8)])
def test_layer_equals_the_loop(tiny_model, mlp_type, router_hidden, normalization, policy):
    model = tiny_model(
        mlp_type=mlp_type,
        router_type="mlp" if router_hidden else "linear",
        router_hidden_size=router_hidden,
        gate_normalization=normalization,
        mlp_routing=policy,
    )
    mlp = model.model.layers[1].mlp
    x = tokens(8)
    actual, logits = mlp(x.view(2, 4, 32))
    assert logits.dtype == torch.float64 and logits.shape == (2, 4, 4)
    # with one kept expert its renormalized gate is constant: the router has no gradient then
    with_router = not (
        (normalization == "renormalized" and policy.get("k") == 1) or policy.get("threshold") == 4
    )
    parameters = [p for name, p in mlp.named_parameters() if with_router or "router" not in name]
    assert_same(actual.view(8, 32), naive_mlp(mlp, x, policy), [x, *parameters])


def test_thresholds_are_ragged(tiny_model):
    """The thresholds above test what they should: tokens that keep different numbers of experts."""
    probs = tiny_model().model.layers[1].mlp.router(tokens(8)).softmax(-1)
    for policy in (POLICIES[3], POLICIES[5]):
        assert len({len(row) for row in kept_by_rule(probs, policy)}) > 1


@pytest.mark.parametrize("normalization", ["softmax", "l2", "renormalized"])
def test_grouped_with_all_experts_equals_dense(tiny_model, normalization):
    """The grouped path, given every pair, is the wide path."""
    experts = tiny_model().model.layers[0].mlp.experts
    x, gates = tokens(), tokens(size=4, seed=5)
    everything = torch.ones(NUM_TOKENS, 4, dtype=torch.bool)
    assert_same(experts(x, gates, everything), experts(x, gates), (x, gates, *experts.parameters()))
    dense = tiny_model(gate_normalization=normalization)
    for policy in (
        {"policy": "top_k", "k": 4},
        {"policy": "threshold", "threshold": 0.0},
        {"policy": "top_p", "top_p": 1.0},
    ):
        sparse = tiny_model(gate_normalization=normalization, mlp_routing=policy)
        ids = torch.arange(12).view(2, 6)
        torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, **CLOSE)


@pytest.mark.parametrize("policy", POLICIES[:4], ids=str)
def test_bfloat16_is_near(tiny_model, policy):
    """Autocast computes experts in bfloat16 and routers in float32."""
    model = tiny_model(dtype=torch.float32, mlp_routing=policy)
    ids = torch.arange(12).view(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.router_logits[0].dtype == torch.float32
    assert math.isfinite(outputs.loss.item())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert abs(outputs.loss.item() - model(ids, labels=ids).loss.item()) < 0.1
