"""The decoding step against transformers' cached path: every policy, attention and gate, in float32 and bfloat16."""

import logging
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from dsmoe.errors import UserError
from dsmoe.model import remove_experts, use_routing
from dsmoe.model.generation import Decoder, backend
from dsmoe.model.generation.decoder import left_padding
from dsmoe.model.kernels import check, decoder, reset_kernel, selection

MOA = {
    "num_attention_heads": 6,
    "num_attention_experts": 3,
    "num_key_value_heads": 2,
    "qk_norm": "per_head",
    "head_dim": 10,
}
MODELS = {
    "dense": {"kind": "dense", "num_experts": 1},
    "dense_gelu": {"kind": "dense", "num_experts": 1, "mlp_type": "gelu", "qk_norm": "none"},
    "all_experts": {"normalize_embeddings": True},
    "top_k": {"mlp_routing": {"policy": "top_k", "k": 2}},
    "top_k_of_weighted": {"mlp_routing": {"policy": "top_k", "k": 2, "score_weights": [1.0, 3.0, 0.4, 2.0]}},
    "threshold": {"mlp_routing": {"policy": "threshold", "threshold": 0.9}, "qk_norm": "none"},
    "thresholds": {"mlp_routing": {"policy": "threshold", "threshold": [0.3, 0.9, 1.5, 0.0]}},
    "top_p": {"mlp_routing": {"policy": "top_p", "top_p": 0.7}, "mlp_type": "gelu"},
    "top_p_of_weighted": {"mlp_routing": {"policy": "top_p", "top_p": 0.6, "score_weights": [1.0, 3.0, 0.4, 2.0]}},
    "threshold_top_k": {"mlp_routing": {"policy": "threshold_top_k", "threshold": 0.9, "k": 2}},
    "threshold_top_k_of_batch": {"mlp_routing": {"policy": "threshold_top_k", "threshold": 0.9}},
    "mlp_router": {"router_type": "mlp", "router_hidden_size": 9, "mlp_routing": {"policy": "top_k", "k": 1}},
    "l2": {"gate_normalization": "l2", "mlp_routing": {"policy": "top_k", "k": 3}, "num_key_value_heads": 1},
    "renormalized": {"gate_normalization": "renormalized", "mlp_routing": {"policy": "top_k", "k": 2}},
    "untied": {"tie_word_embeddings": False, "qk_norm": "per_head", "num_key_value_heads": 4},
    "odd_sizes": {"hidden_size": 37, "head_dim": 18, "intermediate_size": 44, "vocab_size": 101},
    "wide_heads": {"head_dim": 80, "num_attention_heads": 3, "num_key_value_heads": 1},
    "moa": MOA,
    "moa_sparse": {
        **MOA,
        "mlp_routing": {"policy": "threshold", "threshold": 0.9},
        "attention_routing": {"policy": "threshold", "threshold": 0.9},
    },
    "moa_top_k": {**MOA, "qk_norm": "none", "attention_routing": {"policy": "top_k", "k": 1}, "head_dim": 64},
    "removed": {"mlp_kept_experts": [[0, 3], [0, 1, 2, 3]], "mlp_routing": {"policy": "top_k", "k": 2}},
    "removed_thresholds": {
        **MOA,
        "mlp_kept_experts": [[1, 3], [2]],
        "attention_kept_experts": [[0, 2], [1]],
        "mlp_routing": {"policy": "threshold", "threshold": [0.3, 0.9, 1.5, 0.1]},
        "attention_routing": {"policy": "top_p", "top_p": 0.5},
    },
}  # fmt: skip
every_model = pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv(selection.VARIABLE, raising=False)


@pytest.fixture(scope="module", autouse=True)
def _available():
    reset_kernel()
    if not backend.is_available():
        pytest.skip("the C++ step can't be had here")


def prompts(batch=1, length=7, seed=0):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def expected_logits(model, ids, prompt, mask=None):
    """Logits [S - prompt + 1, B, V] of transformers' cached path, fed with `ids` one token at a time."""
    cache, rows = DynamicCache(config=model.config), []
    for end in range(prompt, ids.shape[1] + 1):
        start = 0 if end == prompt else end - 1
        given = None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], end - prompt)], 1)
        outputs = model(ids[:, start:end], attention_mask=given, past_key_values=cache, use_cache=True)
        rows.append(outputs.logits[:, -1])
    return torch.stack(rows)


def decoded(made, ids, prompt, mask=None):
    rows = [made.prefill(ids[:, :prompt], mask).clone()]
    rows += [made.step(ids[:, position]).clone() for position in range(prompt, ids.shape[1])]
    return torch.stack(rows)


def error(actual, expected):
    """Largest relative error of a token's logits, as norms."""
    return float(((actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)).max())


@every_model
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_equals_transformers(tiny_model, overrides, batch):
    model, ids = tiny_model(dtype=torch.float32, **overrides), prompts(batch, 16)
    expected = expected_logits(model, ids, 5)
    made = Decoder(model, 16, batch)
    assert made.backend == "cpp"
    assert error(decoded(made, ids, 5), expected) < 1e-4
    assert made.length == 16
    again = decoded(made, ids[:, :10], 5)
    assert error(again, expected[:6]) < 1e-4, "a second prompt in the same cache"
    assert error(decoded(Decoder(model, 16, batch, "torch"), ids, 5), expected) < 1e-5


@every_model
def test_bfloat16_is_near_the_same_weights_in_float64(tiny_model, overrides):
    """As near as transformers' own bfloat16 path, which rounds more often; both may choose other experts."""
    model, ids = tiny_model(dtype=torch.bfloat16, **overrides), prompts(1, 10)
    actual = decoded(Decoder(model, 16, 1, "cpp"), ids, 3)
    theirs = expected_logits(model, ids, 3)
    expected = expected_logits(model.double(), ids, 3)
    # medians: where rounding flips a choice of experts, single tokens are far off on either side
    ours, others = (statistics.median(map(error, run, expected)) for run in (actual, theirs))
    assert ours < max(2e-2, 2 * others)


@pytest.mark.parametrize("name", ["dense", "top_k", "moa_sparse", "threshold_top_k_of_batch"])
@pytest.mark.parametrize("padding", [0, 3])
def test_long_prompts_in_parts(tiny_model, name, padding, monkeypatch):
    """More prompt tokens than are computed at a time: rows in parts, unless the policy looks at all of them."""
    model, ids = tiny_model(dtype=torch.float64, **MODELS[name]), prompts(5, 12)
    mask = torch.ones(5, 8, dtype=torch.int64)
    mask[1, :padding] = 0
    expected = expected_logits(model, ids, 8, mask)
    calls = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("dsmoe.model.generation.decoder.PREFILL_TOKENS", 17)
    assert error(decoded(Decoder(model, 12, 5), ids, 8, mask), expected) < 1e-6  # logits are float32
    assert calls[:3] == ([5, 5, 5] if name == "threshold_top_k_of_batch" else [2, 2, 1])


@pytest.mark.parametrize("name", ["dense", "top_k", "moa_sparse", "threshold_top_k_of_batch"])
@pytest.mark.parametrize("kind", ["cpp", "torch"])
def test_left_padding(tiny_model, name, kind):
    model, ids = tiny_model(dtype=torch.float32, **MODELS[name]), prompts(4, 14)
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[0, :3] = mask[1, :7] = 0
    expected = expected_logits(model, ids, 8, mask)
    assert error(decoded(Decoder(model, 14, 4, kind), ids, 8, mask), expected) < 1e-4


@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8])
def test_long_contexts_and_shared_keys(tiny_model, dtype, bound, heads):
    """More slots than a vector has lanes, an odd number of them, and each number of heads that share their keys."""
    sizes = {
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 144,
        "max_position_embeddings": 64,
    }
    model, ids = tiny_model(dtype=dtype, kind="dense", num_experts=1, **sizes), prompts(2, 40)
    actual = decoded(Decoder(model, 40, 2, "cpp"), ids, 34)
    assert error(actual, expected_logits(model.double(), ids, 34)) < bound


def test_many_sequences_and_threads(tiny_model):
    """More sequences than are computed together, and a work that is split."""
    model, ids = tiny_model(dtype=torch.float32, **MODELS["moa_sparse"]), prompts(19, 9)
    expected = expected_logits(model, ids, 4)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert error(decoded(Decoder(model, 9, 19), ids, 4), expected) < 1e-4
    finally:
        torch.set_num_threads(before)


@settings(max_examples=25, deadline=None)
@given(
    policy=st.sampled_from(["dense", "top_k", "threshold", "top_p", "threshold_top_k"]),
    normalization=st.sampled_from(["softmax", "l2", "renormalized"]),
    experts=st.integers(2, 9),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20)),
    width=st.integers(1, 9),
    hidden=st.integers(1, 70),
    share=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_shape(tiny_model, policy, normalization, experts, heads, width, hidden, share, seed):
    fields = {
        "dense": {},
        "top_k": {"k": max(1, int(share * experts))},
        "threshold": {"threshold": 2 * share},
        "top_p": {"top_p": share},
        "threshold_top_k": {"threshold": 2 * share},
    }[policy]
    model = tiny_model(
        seed,
        torch.float32,
        hidden_size=hidden,
        num_experts=experts,
        intermediate_size=experts * width,
        num_key_value_heads=heads[0],
        num_attention_heads=heads[0] * heads[1],
        head_dim=2 * heads[2],
        gate_normalization=normalization,
        num_hidden_layers=1,
        mlp_routing={"policy": policy, **fields},
    )
    ids = prompts(2, 5, seed)
    assert error(decoded(Decoder(model, 5, 2), ids, 2), expected_logits(model, ids, 2)) < 1e-4


def test_policies_are_read_at_prefill(tiny_model):
    model, ids = tiny_model(dtype=torch.float32), prompts(1, 9)
    made = Decoder(model, 9)
    with use_routing(model, mlp={"policy": "top_k", "k": 1}):
        expected = expected_logits(model, ids, 4)
        assert error(decoded(made, ids, 4), expected) < 1e-4
    assert error(decoded(made, ids, 4), expected) > 1e-2
    remove_experts(model, "mlp", [[0, 1], [2]])
    assert error(decoded(made, ids, 4), expected_logits(model, ids, 4)) < 1e-4


def test_weights_are_read_in_place(tiny_model):
    model, ids = tiny_model(dtype=torch.float32), prompts(1, 9)
    made = Decoder(model, 9)
    addresses = {tensor.data_ptr() for tensor in made._steps.plan.alive if isinstance(tensor, torch.Tensor)}
    assert all(parameter.data_ptr() in addresses for parameter in model.parameters())
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert error(decoded(made, ids, 4), expected_logits(model, ids, 4)) < 1e-4
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    assert made.cache.nbytes == 2 * 2 * heads * size * 9 * 4


def test_a_full_cache_is_told(tiny_model):
    model = tiny_model(dtype=torch.float32)
    for kind in ("cpp", "torch"):
        made = Decoder(model, 8, 1, kind)
        with pytest.raises(UserError, match="prefill first"):
            made.step(torch.tensor([1]))
        with pytest.raises(UserError, match="9 tokens; the cache has room for 8"):
            made.prefill(prompts(1, 9))
        made.prefill(prompts(1, 7))
        made.step(torch.tensor([1]))
        with pytest.raises(UserError, match="the cache is full: it has 8 slots"):
            made.step(torch.tensor([1]))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[1, 2]], None, r"must be \[2, at least 1\]"),
        ([[1, 2], [3, 4]], [[1, 0], [1, 1]], "padded on the left"),
        ([[1, 2], [3, 4]], [[0, 0], [1, 1]], "padded on the left"),
        ([[1, 2], [3, 4]], [[1], [1]], "attention_mask is"),
    ],
)
def test_bad_prompts_are_told(tiny_model, ids, mask, message):
    made = Decoder(tiny_model(dtype=torch.float32), 8, 2)
    with pytest.raises(UserError, match=message):
        made.prefill(torch.tensor(ids), None if mask is None else torch.tensor(mask))


def test_bad_tokens_are_told(tiny_model):
    made = Decoder(tiny_model(dtype=torch.float32), 8)
    made.prefill(prompts())
    for token in (-1, 97, -1):
        with pytest.raises(UserError, match="below 97"):
            made.step(torch.tensor([token]))


def test_padding_is_counted():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert left_padding(mask, mask).tolist() == [2, 0]


def test_what_is_not_covered_is_told_once(tiny_model, caplog):
    model, ids = tiny_model(), prompts(1, 9)
    backend._told.clear()
    with caplog.at_level(logging.WARNING):
        made = Decoder(model, 9)
        Decoder(model, 9)
    assert made.backend == "torch" and [r.message for r in caplog.records].count(caplog.messages[0]) == 1
    assert "torch operations instead of cpp, because the weights are torch.float64" in caplog.text
    assert error(decoded(made, ids, 4), expected_logits(model, ids, 4)) < 1e-6
    with pytest.raises(UserError, match="backend 'cpp': the weights are"):
        Decoder(model, 9, 1, "cpp")
    with pytest.raises(UserError, match="it must be cpp or torch"):
        Decoder(model, 9, 1, "cuda")
    small = tiny_model(dtype=torch.float32)
    small.model.layers[0].self_attn.q_proj = torch.nn.Linear(32, 32)
    with pytest.raises(UserError, match="a projection is Linear"):
        Decoder(small, 9, 1, "cpp")


def test_without_the_kernel_generation_works(tiny_model, monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, "eager")
    reset_kernel()
    model, ids = tiny_model(dtype=torch.float32), prompts(1, 9)
    made = Decoder(model, 9)
    assert made.backend == "torch"
    assert error(decoded(made, ids, 4), expected_logits(model, ids, 4)) < 1e-5
    reset_kernel()


def test_a_wrong_kernel_is_not_used(monkeypatch):
    monkeypatch.setattr(backend, "_error", lambda overrides, dtype: float("nan"))
    with pytest.raises(check.KernelUnavailable, match="numbers are wrong"):
        backend.probe("cpu")
    with pytest.raises(check.KernelUnavailable, match="on CPU only"):
        backend.probe("cuda")


@pytest.mark.parametrize("kind", ["cpp", "torch"])
def test_cropping_goes_back(tiny_model, kind):
    model, ids = tiny_model(dtype=torch.float32), prompts(1, 9)
    made = Decoder(model, 9, 1, kind)
    expected = decoded(made, ids, 4)
    made.crop(5)
    again = torch.stack([made.step(ids[:, position]).clone() for position in range(5, 9)])
    torch.testing.assert_close(again, expected[2:])
    for length in (0, 10):
        with pytest.raises(UserError, match=r"from 1 .*to the 9 tokens"):
            made.crop(length)


@pytest.mark.parametrize("kind", ["cpp", "torch"])
def test_cropping_leaves_a_token_of_each_sequence(tiny_model, kind):
    model, ids = tiny_model(dtype=torch.float32), prompts(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    made = Decoder(model, 9, 2, kind)
    made.prefill(ids[:, :6], mask[:, :6])
    expected = made.step(ids[:, 6]).clone()
    made.step(ids[:, 7])
    for length in (1, 3, 4):
        with pytest.raises(UserError, match=r"from 5 .the longest padding and a token. to the 8 tokens"):
            made.crop(length)
    made.crop(6)
    torch.testing.assert_close(made.step(ids[:, 6]), expected)


def test_the_probe_judges_alike_under_autocast():
    reset_kernel()
    with torch.autocast("cpu", torch.bfloat16):
        backend.probe("cpu")
    reset_kernel()


def test_parts_take_time(tiny_model):
    made = Decoder(tiny_model(dtype=torch.float32), 9, profile=True)
    decoded(made, prompts(1, 9), 4)
    assert tuple(made.seconds) == decoder.PARTS and min(made.seconds.values()) > 0


def test_weights_that_are_replaced_stay_where_they_were_read(tiny_model):
    """`Module.to` and `.data =` put another storage under the same parameter, and the old one was freed."""
    model = tiny_model(dtype=torch.float32).eval()
    decoder = Decoder(model, 8, backend="cpp")
    decoder.prefill(torch.tensor([[1, 2, 3]]))
    before = decoder.step(torch.tensor([4])).clone()
    held = {one.data_ptr() for one in decoder._steps.plan.alive if isinstance(one, torch.Tensor)}
    assert model.model.norm.weight.data_ptr() in held
    decoder.crop(3)
    for parameter in model.parameters():
        parameter.data = parameter.data * 2.0
    assert model.model.norm.weight.data_ptr() not in held
    junk = [torch.full_like(parameter, float("nan")) for parameter in model.parameters()]
    assert torch.equal(decoder.step(torch.tensor([4])), before) and junk
    # the next prefill reads the new ones, and refuses what the step can't run
    decoder.prefill(torch.tensor([[1, 2, 3]]))
    assert not torch.equal(decoder.step(torch.tensor([4])), before)
    for change, words in (
        (model.bfloat16, "its weights were torch.float32 and are torch.bfloat16"),
        (model.double, "it computes float32 and bfloat16"),
    ):
        change()
        with pytest.raises(UserError, match=words):
            decoder.prefill(torch.tensor([[1, 2, 3]]))
