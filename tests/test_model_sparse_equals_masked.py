"""The sparse forward against a masked dense forward, in float64 to 1e-10, for all that a config can express.

The oracle is a whole model of its own, written here: every expert of every token is computed from the weights as they
were before any were removed, and the gates of those that a plain loop over tokens doesn't choose are set to zero.
"""

import copy
from functools import lru_cache
from itertools import product

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from dsmoe import DSMoEConfig, DSMoEForCausalLM
from dsmoe.model import remove_experts, set_routing

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
N, A, LAYERS, LENGTH = 6, 3, 2, 5
SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 4 * N,
    "num_hidden_layers": LAYERS,
    "num_experts": N,
    "num_attention_heads": 2 * A,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    # far above the usual: routers then differ from uniform, and sets are ragged
    "initializer_range": 0.4,
}
MOA = {"num_attention_experts": A, "qk_norm": "per_head"}
KEPT = {"mlp": [[0, 2, 3, 5], None], "attention": [None, [1, 2]]}
POLICIES = {
    "dense": {"policy": "dense"},
    "top_k": {"policy": "top_k", "k": 2},
    "threshold": {"policy": "threshold", "threshold": 0.9},
    "per_expert": {"policy": "threshold", "threshold": [0.2, 0.7, 1.1, 0.9, 1.9, 0.05]},
    "top_p": {"policy": "top_p", "top_p": 0.6},
    "threshold_top_k": {"policy": "threshold_top_k", "threshold": 0.5, "k": 2},
    "batch_k": {"policy": "threshold_top_k", "threshold": [0.9, 0.8, 0.7, 1.0, 1.1, 1.2], "k": None},
}
WEIGHTS = [0.3, 1.7, 0.9, 2.5, 0.6, 1.1]
GATES = ("softmax", "l2", "renormalized")
CASES = [
    (name, weighted, removed, gates, moa)
    for name, weighted, removed, gates, moa in product(POLICIES, *[(False, True)] * 2, GATES, (False, True))
    if not (name == "dense" and weighted)
]


@lru_cache(maxsize=64)
def whole_model(gates="softmax", moa=False, mlp_type="swiglu", router_type="linear"):
    """A model with all its experts in float64; not to be changed."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = DSMoEConfig(
            **{**SIZES, **(MOA if moa else {})}, gate_normalization=gates, mlp_type=mlp_type,
            router_type=router_type, router_hidden_size=5 if router_type == "mlp" else 0,
        )  # fmt: skip
        return DSMoEForCausalLM(config).double().eval().requires_grad_(False)


def policy_for(name, weighted, num_experts):
    """A policy of POLICIES cut to the number of experts."""
    policy = dict(POLICIES[name])
    if isinstance(policy.get("threshold"), list):
        policy["threshold"] = policy["threshold"][:num_experts]
    return {**policy, "score_weights": WEIGHTS[:num_experts]} if weighted else policy


def sparse_model(whole, policies, kept):
    """A copy of the whole model with its policies set and experts removed."""
    model = copy.deepcopy(whole)
    for part, entries in kept.items():
        remove_experts(model, part, entries)
        set_routing(model, part, policies[part])
    return model


# ---- the oracle


def chosen(probs_TN, policy, kept):
    """The experts that each token keeps, as one set per token, by the rules of dsmoe.config.routing."""
    rows, n = probs_TN.tolist(), probs_TN.shape[1]
    if policy["policy"] == "threshold_top_k" and policy["k"] is None:
        counts = [len(kept_of(row, {**policy, "policy": "threshold"}, kept)) for row in rows]
        assert abs(sum(counts) / len(counts) % 1 - 0.5) > 1e-6
        policy = {**policy, "k": max(1, min(n, round(sum(counts) / len(counts))))}
    return [kept_of(row, policy, kept) for row in rows]


def kept_of(probs, policy, kept):
    n, name = len(probs), policy["policy"]
    weights = policy.get("score_weights", [1.0] * n)
    scores = [p * w for p, w in zip(probs, weights)]
    ranked = sorted(kept, key=lambda expert: -scores[expert])
    if name == "dense":
        return set(kept)
    if name in ("top_k", "threshold_top_k"):
        return set(ranked[: policy["k"]])
    if name == "threshold":
        limits = policy["threshold"]
        limits = limits if isinstance(limits, list) else [limits] * n
        return {ranked[0]} | {expert for expert in kept if n * scores[expert] > limits[expert]}
    found, share = set(), 0.0
    for expert in ranked:
        if found and share >= policy["top_p"]:
            break
        found.add(expert)
        share += scores[expert] / sum(scores)
    return found


def oracle_gates(x_TD, router, policy, kept, config, scale, counts):
    """Gates [T, N] that are zero for experts that aren't kept; `counts` collects how many each token keeps."""
    if config.router_type == "mlp":
        logits_TN = silu(x_TD @ router.in_proj.T) @ router.out_proj.T
    else:
        logits_TN = x_TD @ router.weight.T
    probs_TN = logits_TN.softmax(-1)
    mask_TN = torch.zeros_like(probs_TN)
    sets = chosen(probs_TN.detach(), policy, range(probs_TN.shape[1]) if kept is None else kept)
    for token, experts in enumerate(sets):
        mask_TN[token, sorted(experts)] = 1.0
    counts.append([len(experts) for experts in sets])
    masked_TN = probs_TN * mask_TN
    if config.gate_normalization == "l2":
        masked_TN = masked_TN / probs_TN.square().sum(-1, keepdim=True).sqrt()
    if config.gate_normalization == "renormalized":
        masked_TN = masked_TN / masked_TN.sum(-1, keepdim=True)
    return scale * masked_TN


def normed(x, norm):
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def oracle_attention(module, config, x_BSD, cos, sin, visible_BSS, gates_TA):
    """Attention of all heads [B, S, heads, hd]; under MoA expert e's head j reads KV head j."""
    batch, length, _ = x_BSD.shape
    full = config.qk_norm == "full"
    k_BSKh, v_BSKh = (x_BSD @ p.weight.T for p in (module.k_proj, module.v_proj))
    if full:
        k_BSKh = normed(k_BSKh, module.k_norm)
    k_BSKh, v_BSKh = (t.view(batch, length, -1, config.head_dim) for t in (k_BSKh, v_BSKh))
    if gates_TA is None:
        q = normed(x_BSD @ module.q_proj.weight.T, module.q_norm)
        q = q.view(batch, length, -1, config.head_dim)
        per_kv = q.shape[2] // k_BSKh.shape[2]
        reads = [head // per_kv for head in range(q.shape[2])]
    else:
        q = torch.einsum("bsd,awd->bsaw", x_BSD, module.experts_q_proj)
        q = q.reshape(batch, length, -1, config.head_dim)
        q, k_BSKh = normed(q, module.q_norm), normed(k_BSKh, module.k_norm)
        reads = [head % k_BSKh.shape[2] for head in range(q.shape[2])]
    q, k_BSKh = (turned(t, cos[:, :, None], sin[:, :, None]) for t in (q, k_BSKh))
    scores = torch.einsum("bshd,bthd->bhst", q, k_BSKh[:, :, reads]) / config.head_dim**0.5
    weights = scores.masked_fill(~visible_BSS[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhst,bthd->bshd", weights, v_BSKh[:, :, reads])
    if gates_TA is None:
        return out.flatten(2) @ module.o_proj.weight.T
    by_expert = out.reshape(batch * length, gates_TA.shape[1], -1)
    y = torch.einsum("ta,taw,awd->td", gates_TA, by_expert, module.experts_o_proj)
    return y.view(x_BSD.shape)


def oracle_mlp(experts, x_TD, gates_TN):
    up = torch.einsum("td,nhd->tnh", x_TD, experts.input_proj)
    if experts.mlp_type == "swiglu":
        gate, up = up.chunk(2, -1)
        hidden = silu(gate) * up
    else:
        hidden = gelu(up)
    return torch.einsum("tn,tnf,nfd->td", gates_TN, hidden, experts.down_proj)


def masked_dense(whole, ids, mask, policies, kept, counts):
    """Logits [B, S, V] of the whole model with the gates of experts that aren't kept at zero."""
    config, model = whole.config, whole.model
    x = model.embed_tokens.weight[ids]
    cos, sin = model.rotary_emb(x, positions_of(mask))
    visible = torch.ones(ids.shape[1], ids.shape[1]).tril().bool() & mask.bool()[:, None, :]
    visible = visible | torch.eye(ids.shape[1]).bool()
    for layer_idx, layer in enumerate(model.layers):
        read, gates = normed(x, layer.input_layernorm), None
        if config.num_attention_experts > 1:
            gates = oracle_gates(
                read.flatten(0, 1), layer.self_attn.router, policies["attention"][layer_idx],
                kept["attention"][layer_idx], config, config.attention_gate_scale, counts,
            )  # fmt: skip
        x = x + oracle_attention(layer.self_attn, config, read, cos, sin, visible, gates)
        read = normed(x, layer.post_attention_layernorm).flatten(0, 1)
        gates = oracle_gates(
            read, layer.mlp.router, policies["mlp"][layer_idx], kept["mlp"][layer_idx], config,
            config.mlp_gate_scale, counts,
        )  # fmt: skip
        x = x + oracle_mlp(layer.mlp.experts, read, gates).view(x.shape)
    return normed(x, model.norm) @ whole.lm_head.weight.T


# ---- how a text goes in


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def token_ids(batch, length=LENGTH, seed=0):
    return torch.randint(1, 31, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(lengths, side):
    """Mask of rows of so many real tokens."""
    place = torch.arange(max(lengths)).expand(len(lengths), -1)
    real = torch.tensor(lengths)[:, None]
    return ((place < real) if side == "right" else (place >= max(lengths) - real)).long()


def logits_with_cache(model, ids, mask, chunks):
    """Logits of a forward per chunk of positions, continued by the cache."""
    cache, found, start = None, [], 0
    for size in chunks:
        end = start + size
        outputs = model(
            ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
            position_ids=positions_of(mask)[:, start:end],
        )  # fmt: skip
        cache, start = outputs.past_key_values, end
        found.append(outputs.logits)
    return torch.cat(found, 1)


def assert_real_equal(actual, expected, mask):
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **CLOSE)


# ---- the tests


def assert_all_ways_agree(whole, model, policies, kept, by_token=True):
    """Batched with either padding, and with the cache (token by token, or one after a prompt): together and alone."""
    counts, ids = [], token_ids(3)
    for side in ("right", "left"):
        mask = padding([2, LENGTH, 4], side)
        expected = masked_dense(whole, ids, mask, policies, kept, counts)
        actual = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        assert_real_equal(actual, expected, mask)
    chunks = [1] * LENGTH if by_token else [LENGTH - 1, 1]
    assert_real_equal(logits_with_cache(model, ids, mask, chunks), expected, mask)
    alone = logits_with_cache(model, ids[1:2], mask[1:2], chunks)
    torch.testing.assert_close(alone, expected[1:2], **CLOSE)
    return counts


@pytest.mark.parametrize(("name", "weighted", "removed", "gates", "moa"), CASES)
@torch.no_grad()
def test_every_policy(name, weighted, removed, gates, moa):
    whole = whole_model(gates, moa)
    policies = {
        "mlp": [policy_for(name, weighted, N)] * LAYERS,
        "attention": [policy_for(name, weighted, A)] * LAYERS if moa else [{"policy": "dense"}] * LAYERS,
    }
    kept = {"mlp": [None] * LAYERS, "attention": [None] * LAYERS}
    if removed:
        kept = {**kept, "mlp": KEPT["mlp"], **({"attention": KEPT["attention"]} if moa else {})}
    model = sparse_model(whole, policies, kept)
    if name == "batch_k":
        # tokens depend on each other, padding too: only the same batch can be compared
        ids = token_ids(3)
        mask = torch.ones_like(ids)
        expected = masked_dense(whole, ids, mask, policies, kept, [])
        torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
        return
    counts = assert_all_ways_agree(whole, model, policies, kept, by_token=gates == "softmax")
    if name in ("threshold", "per_expert", "top_p"):
        assert any(len(set(row)) > 1 for row in counts), "the sets are not ragged"


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@pytest.mark.parametrize("router_type", ["linear", "mlp"])
@torch.no_grad()
def test_other_forms_of_experts_and_routers(mlp_type, router_type):
    whole = whole_model("softmax", True, mlp_type, router_type)
    policies = {
        "mlp": [policy_for("per_expert", True, N), policy_for("top_p", False, N)],
        "attention": [policy_for("top_p", True, A), policy_for("per_expert", False, A)],
    }
    assert_all_ways_agree(whole, sparse_model(whole, policies, KEPT), policies, KEPT)


@st.composite
def layer_settings(draw, num_experts):
    """A policy and the stored experts of a layer (None: all)."""
    experts = st.sets(st.integers(0, num_experts - 1), min_size=1)
    kept = sorted(draw(experts)) if draw(st.booleans()) else None
    name = draw(st.sampled_from(["dense", "top_k", "threshold", "top_p", "threshold_top_k"]))
    policy = {"policy": name}
    numbers = st.floats(0.05, 2.0)
    per_expert = st.lists(numbers, min_size=num_experts, max_size=num_experts)
    if "threshold" in name:
        policy["threshold"] = draw(
            st.one_of(st.floats(0.01, 1.0), per_expert.map(lambda t: [x / 41 for x in t]))
        )
    if "top_k" in name:
        policy["k"] = draw(st.integers(1, num_experts if kept is None else len(kept)))
    if name == "top_p":
        policy["top_p"] = draw(st.floats(0.05, 0.95))
    if name != "dense" and draw(st.booleans()):
        policy["score_weights"] = draw(per_expert)
    return policy, kept


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layers=st.lists(st.tuples(layer_settings(N), layer_settings(A)), min_size=LAYERS, max_size=LAYERS),
    gates=st.sampled_from(GATES),
    moa=st.booleans(),
    side=st.sampled_from(["left", "right"]),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=3),
    chunks=st.lists(st.integers(1, 4), max_size=7),
    seed=st.integers(0, 3),
)
@torch.no_grad()
def test_any_mixture(layers, gates, moa, side, lengths, chunks, seed):
    whole = whole_model(gates, moa)
    dense = ({"policy": "dense"}, None)
    settings_of = {"mlp": [mlp for mlp, _ in layers], "attention": [at if moa else dense for _, at in layers]}
    policies = {part: [policy for policy, _ in pairs] for part, pairs in settings_of.items()}
    kept = {part: [entry for _, entry in pairs] for part, pairs in settings_of.items()}
    model = sparse_model(whole, policies, kept)
    ids, mask = token_ids(len(lengths), max(lengths), seed), padding(lengths, side)
    expected = masked_dense(whole, ids, mask, policies, kept, [])
    sizes, left = [], max(lengths)
    for size in [*chunks, left]:
        sizes.append(min(size, left))
        left -= sizes[-1]
    sizes = [size for size in sizes if size]
    assume(sum(sizes) == max(lengths))
    assert_real_equal(logits_with_cache(model, ids, mask, sizes), expected, mask)
    actual = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    assert_real_equal(actual, expected, mask)


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", ["dense", "per_expert", "top_p", "top_k"])
def test_gradients_after_removal(name, gates):
    """Fine-tuning what is left: every stored weight gets the gradient that it has in the masked dense model."""
    whole = copy.deepcopy(whole_model(gates, True)).requires_grad_()
    weighted = name != "dense"
    policies = {"mlp": [policy_for(name, weighted, N)] * LAYERS}
    policies["attention"] = [policy_for(name, weighted, A)] * LAYERS
    model = sparse_model(whole, policies, KEPT).train()
    ids = token_ids(2)
    cotangent = torch.randn(2, LENGTH, 31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model(ids).logits.backward(cotangent)
    masked_dense(whole, ids, torch.ones_like(ids), policies, KEPT, []).backward(cotangent)
    wanted = {parameter_name: parameter.grad for parameter_name, parameter in whole.named_parameters()}
    for parameter_name, parameter in model.named_parameters():
        expected = wanted[parameter_name]
        if parameter.shape != expected.shape:
            layer = int(parameter_name.split(".")[2])
            rows = KEPT["mlp" if ".mlp." in parameter_name else "attention"][layer]
            removed = [row for row in range(len(expected)) if row not in rows]
            assert not expected[removed].any()
            expected = expected[rows]
        assert parameter.grad.abs().sum() > 0, parameter_name
        torch.testing.assert_close(parameter.grad, expected, msg=parameter_name, **CLOSE)


@torch.no_grad()
def test_the_oracle_notices():
    """Another gate, another expert or another normalisation is no rounding error."""
    whole, ids = whole_model("softmax", True), token_ids(2)
    mask = torch.ones_like(ids)
    policies = {"mlp": [policy_for("top_k", False, N)] * 2, "attention": [policy_for("top_k", False, A)] * 2}
    kept = {"mlp": [None, None], "attention": [None, None]}
    base = masked_dense(whole, ids, mask, policies, kept, [])
    weighted = {**policies, "mlp": [policy_for("top_k", True, N)] * 2}
    per_expert = {**policies, "attention": [policy_for("per_expert", False, A)] * 2}
    for other, stored in ((weighted, kept), (per_expert, kept), (policies, KEPT)):
        assert (masked_dense(whole, ids, mask, other, stored, []) - base).abs().max() > 1e-3
