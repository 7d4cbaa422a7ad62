"""Models of one seed hold the same weights, and with uniform routers they are the same function."""

import pytest
import torch

from dsmoe.checkpoint.pretrained import load_pretrained, save_pretrained

DENSE = {"kind": "dense", "num_experts": 1}
MOA = {"num_attention_experts": 2}
TOP_2 = {"policy": "top_k", "k": 2}


def flat_mlp(weights, prefix, mlp_type):
    """An MLP's weights in the twin's order: all gate rows, then all up rows; then the rows of down."""
    down = weights[f"{prefix}.down_proj"].flatten(0, 1)
    if mlp_type == "gelu":
        return weights[f"{prefix}.up_proj"].flatten(0, 1), down
    gate, up = weights[f"{prefix}.gate_up_proj"].chunk(2, dim=1)
    return torch.cat([gate.flatten(0, 1), up.flatten(0, 1)]), down


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"kind": "smoe", "mlp_routing": TOP_2},
        {"num_experts": 16},
        {"router_type": "mlp", "router_hidden_size": 8},
    ],
    ids=["dsmoe", "smoe", "16", "mlp"],
)
def test_weights_are_shared(tiny_model, overrides, mlp_type):
    twin = tiny_model(3, **DENSE, mlp_type=mlp_type).state_dict()
    other = tiny_model(3, **overrides, mlp_type=mlp_type).state_dict()
    assert {name for name in set(other) - set(twin) if ".router." not in name} == set()
    for name in set(twin):
        if "experts" not in name:
            assert torch.equal(twin[name], other[name]), name
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        for ours, theirs in zip(flat_mlp(other, prefix, mlp_type), flat_mlp(twin, prefix, mlp_type)):
            assert torch.equal(ours, theirs)
    assert not torch.equal(
        twin["model.embed_tokens.weight"], tiny_model(4, **DENSE).state_dict()["model.embed_tokens.weight"]
    )


def test_no_tensor_is_drawn_twice(tiny_model):
    """Every matrix has values of its own."""
    model = tiny_model(
        tie_word_embeddings=False, router_type="mlp", router_hidden_size=8, **MOA, qk_norm="none"
    )
    firsts = [p.flatten()[:4] / p.std() for p in model.parameters() if p.ndim > 1]
    # divided by the standard deviation of the draw, equal draws would give nearly equal numbers
    for i, one in enumerate(firsts):
        assert all((one - other).abs().max() > 0.05 for other in firsts[:i])


def test_spread_of_weights(tiny_model):
    model = tiny_model(hidden_size=128, intermediate_size=512, initializer_range=0.02)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            expected = 0.02 / 2 if name.endswith(("o_proj.weight", "down_proj")) else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name
            assert abs(parameter.mean().item()) < 0.1 * expected
        else:
            assert (parameter == 1).all()


@pytest.mark.parametrize("normalization", ["softmax", "l2", "renormalized"])
@pytest.mark.parametrize("qk_norm", ["none", "per_head", "full"])
@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@torch.no_grad()
def test_uniform_routers_give_the_twin(tiny_model, normalization, qk_norm, mlp_type):
    common = {"mlp_type": mlp_type, "qk_norm": qk_norm}
    ids = torch.arange(1, 21).view(2, 10)
    expected = tiny_model(**DENSE, **common).forward(ids).logits
    arms = [{}, {"num_experts": 16}]
    if qk_norm != "full":
        arms.append(MOA)
    for arm in arms:
        model = tiny_model(**common, **arm, gate_normalization=normalization)
        assert (model(ids).logits - expected).abs().max() > 1e-3
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.zero_()
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", [{}, {"router_type": "mlp", "router_hidden_size": 8}])
@torch.no_grad()
def test_spread_of_router_weights(tiny_model, router):
    ids = torch.arange(1, 21).view(2, 10)
    silent = tiny_model(**router, router_initializer_range=0.0)
    torch.testing.assert_close(silent(ids).logits, tiny_model(**DENSE)(ids).logits, rtol=1e-12, atol=1e-12)
    usual, small = (tiny_model(**router, router_initializer_range=std) for std in (None, 0.02))
    for (name, parameter), other in zip(usual.named_parameters(), small.parameters()):
        last = name.endswith(("router.weight", "router.out_proj"))
        torch.testing.assert_close(other, parameter * 0.1 if last else parameter)


@torch.no_grad()
def test_attention_twin_has_permuted_heads(tiny_model):
    """Expert a of the mixture holds, for each KV head j, the a-th query head of group j of the twin."""
    twin = tiny_model(**DENSE, qk_norm="none").model.layers[0].self_attn
    moa = tiny_model(**MOA, qk_norm="none").model.layers[0].self_attn
    for expert in range(2):
        for j in range(2):
            twin_rows, rows = slice((2 * j + expert) * 8, (2 * j + expert + 1) * 8), slice(j * 8, (j + 1) * 8)
            assert torch.equal(moa.experts_q_proj[expert, rows], twin.q_proj.weight[twin_rows])
            assert torch.equal(moa.experts_o_proj[expert, rows], twin.o_proj.weight[:, twin_rows].T)


@torch.no_grad()
def test_smoe_runs_its_kept_experts_only(tiny_model):
    """An SMoE is a DS-MoE of the same weights with its top-k mask."""
    smoe = tiny_model(kind="smoe", mlp_routing=TOP_2)
    dsmoe = tiny_model(mlp_routing=TOP_2)
    ids = torch.arange(12)[None]
    assert torch.equal(smoe(ids).logits, dsmoe(ids).logits)
    renormalized = tiny_model(kind="smoe", mlp_routing=TOP_2, gate_normalization="renormalized")
    assert renormalized.config.mlp_gate_scale == 2


@torch.no_grad()
def test_normalized_embeddings(tiny_model):
    model = tiny_model(normalize_embeddings=True, rms_norm_eps=0.0)
    embedded = model(torch.arange(97)[None], output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(embedded.square().mean(-1), torch.ones(1, 97, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("normalized", [False, True])
def test_embeddings_that_are_given_count_as_those_of_the_tokens(tiny_model, normalized):
    model, ids = tiny_model(normalize_embeddings=normalized), torch.arange(12).view(2, 6)
    rows = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=rows).logits, model(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False}
    new = model.generate(inputs_embeds=rows, **options)
    assert torch.equal(new, model.generate(ids, **options)[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mean_resizing", [False, True])
@pytest.mark.parametrize("size", [90, 97, 112])
def test_the_vocabulary_can_be_resized(tiny_model, tmp_path, size, mean_resizing, tied):
    model = tiny_model(dtype=torch.float32, tie_word_embeddings=tied)
    ids = torch.arange(20).view(2, 10)
    expected = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=mean_resizing)
    logits = model(ids).logits
    kept = min(size, 97)
    assert logits.shape == (2, 10, size) and model.config.vocab_size == size
    torch.testing.assert_close(logits[..., :kept], expected[..., :kept])
    table = model.get_input_embeddings().weight
    # as large as the others, which were drawn with 0.2; around their mean is transformers' own affair
    assert size <= 97 or mean_resizing or 0.1 < table[97:].std() < 0.3
    assert (model.lm_head.weight is table) == tied
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert new.shape == (2, 14)
    save_pretrained(model, tmp_path / "model", None)
    loaded, _ = load_pretrained(tmp_path / "model", torch.float32)
    assert torch.equal(loaded(ids).logits, logits)
