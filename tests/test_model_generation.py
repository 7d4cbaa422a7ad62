"""Generation, padding, packed documents, gradient checkpointing and the flow of gradients, in float64."""

import inspect

import pytest
import torch
from transformers import OlmoeForCausalLM

from dsmoe.export.targets import target_config, target_weights
from dsmoe.model import set_routing, use_routing
from dsmoe.model.kernels import reset_kernel

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MOA = {"num_attention_experts": 2, "qk_norm": "per_head"}
MODELS = {
    "dense": {"kind": "dense", "num_experts": 1},
    "smoe": {"kind": "smoe", "mlp_routing": {"policy": "top_k", "k": 2}},
    "dsmoe": {},
    "top_k": {"mlp_routing": {"policy": "top_k", "k": 2}},
    "threshold": {"mlp_routing": {"policy": "threshold", "threshold": 0.9}},
    "top_p": {"mlp_routing": {"policy": "top_p", "top_p": 0.7}, "mlp_type": "gelu"},
    "moa": MOA,
    "moa_sparse": {
        **MOA,
        "mlp_routing": {"policy": "threshold", "threshold": 0.9},
        "attention_routing": {"policy": "threshold", "threshold": 0.8},
    },
}
every_model = pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)


def token_ids(batch=2, length=9, seed=0):
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def checkpointed(model):
    """With activation checkpointing, under the name that this transformers has for it."""
    name = "activation_checkpointing_enable"
    getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")()
    return model


def loss_of(model, ids):
    """Next-token loss in float64 (that of transformers is taken in float32)."""
    logits = model(ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@every_model
@pytest.mark.parametrize("batch", [1, 2])
def test_generation_with_cache_equals_without(tiny_model, overrides, batch):
    model, ids = tiny_model(**overrides), token_ids(batch)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    with_cache = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    without = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert with_cache.sequences.shape == (batch, 17)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(torch.stack(with_cache.logits), torch.stack(without.logits), **CLOSE)


@every_model
def test_generation_with_left_padding(tiny_model, overrides):
    model, ids = tiny_model(**overrides), token_ids(1)
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    both = torch.cat([padded, token_ids(1, 12, seed=1)])
    mask = torch.ones_like(both)
    mask[0, :3] = 0
    together = model.generate(both, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(together[0, 3:], alone[0])


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(tiny_model, overrides, side):
    model, ids = tiny_model(**overrides), token_ids(1)
    expected = model(ids)
    pad, ones = torch.full((1, 4), 5), torch.ones(1, 9, dtype=torch.long)
    parts = (pad, ids) if side == "left" else (ids, pad)
    masks = (0 * pad, ones) if side == "left" else (ones, 0 * pad)
    real = slice(4, None) if side == "left" else slice(0, 9)
    others = token_ids(1, 13, seed=2)
    batch = torch.cat([torch.cat(parts, 1), others])
    mask = torch.cat([torch.cat(masks, 1), torch.ones_like(others)])
    actual = model(batch, attention_mask=mask)
    assert torch.isfinite(actual.logits).all()
    # angles are float32: positions shifted by 4 turn by angles that are off in the last bits
    close = {"rtol": 1e-4, "atol": 1e-4} if side == "left" else CLOSE
    torch.testing.assert_close(actual.logits[:1, real], expected.logits, **close)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = model(batch, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(actual.logits[:1, real], expected.logits, **CLOSE)


@every_model
@torch.no_grad()
def test_packed_documents_are_isolated(tiny_model, overrides):
    model, first, second = tiny_model(**overrides), token_ids(1, 5), token_ids(1, 4, seed=3)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    apart = torch.cat([model(first, use_cache=False).logits, model(second, use_cache=False).logits], dim=1)
    # the config's default makes a cache
    for options in ({"use_cache": False}, {}):
        packed = model(torch.cat([first, second], dim=1), position_ids=positions, **options).logits
        torch.testing.assert_close(packed, apart, **CLOSE)


@every_model
def test_checkpointing_gives_the_same_gradients(tiny_model, overrides):
    ids, gradients = token_ids(), []
    for model in (tiny_model(**overrides).train(), checkpointed(tiny_model(**overrides).train())):
        loss_of(model, ids).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("policy", [{"policy": "threshold", "threshold": 1.1}, {"policy": "top_k", "k": 1}])
@pytest.mark.parametrize("base", [{"policy": "dense"}, {"policy": "threshold", "threshold": 0.8}])
def test_checkpointing_computes_again_under_the_same_policies(tiny_model, base, policy):
    """The backward pass of a block with other policies may come after it, when the config has its own back."""
    ids, gradients = token_ids(), []
    for model in (tiny_model(**MOA).train(), checkpointed(tiny_model(**MOA).train())):
        set_routing(model, "mlp", base)
        with use_routing(model, mlp=policy, attention={"policy": "top_k", "k": 1}):
            loss = loss_of(model, ids)
        own = model.config.mlp_routing
        loss.backward()
        assert model.config.mlp_routing is own
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("router_type", ["linear", "mlp"])
@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_every_expert_and_router_learns(tiny_model, mlp_type, router_type):
    model = tiny_model(
        mlp_type=mlp_type, router_type=router_type, router_hidden_size=8 if router_type == "mlp" else 0, **MOA
    )
    loss_of(model, token_ids()).backward()
    checked = 0
    for name, parameter in model.named_parameters():
        rows = parameter.grad if "experts" in name or ".router." in name else parameter.grad[None]
        assert (rows.flatten(1).abs().sum(-1) > 0).all(), name
        checked += "experts" in name or ".router." in name
    assert checked == 2 * (4 + 2 * (2 if router_type == "mlp" else 1))


@every_model
def test_routers_keep_float64(tiny_model, overrides):
    outputs = tiny_model(**overrides)(token_ids())
    assert outputs.logits.dtype == torch.float64
    for logits in (outputs.router_logits or ()) + (outputs.attention_router_logits or ()):
        assert logits.dtype == torch.float64
    assert (outputs.router_logits is None) == (overrides.get("num_experts") == 1)
    assert (outputs.attention_router_logits is None) == ("num_attention_experts" not in overrides)


def test_loss_is_language_modelling_alone(tiny_model):
    model, ids = tiny_model(), token_ids()
    expected = loss_of(model, ids).item()
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    assert model(ids, shift_labels=shifted).loss.item() == pytest.approx(expected, rel=1e-5)
    halved = model(ids, shift_labels=shifted, num_items_in_batch=torch.tensor(32)).loss.item()
    assert halved == pytest.approx(expected / 2, rel=1e-5)
    last = model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(ids).logits[:, -1:], **CLOSE)


def test_bfloat16_weights_run(tiny_model):
    """A model in bfloat16, as served: routers still in float32, thresholds as they were."""
    policy = {"policy": "threshold", "threshold": 0.4871}
    model = tiny_model(dtype=torch.bfloat16, **MOA, mlp_routing=policy, attention_routing=policy)
    outputs = model(token_ids())
    assert outputs.logits.dtype == torch.bfloat16
    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
    assert [p["threshold"] for p in model.config.mlp_routing] == [0.4871] * 2


@pytest.fixture(params=["lean step", "forward pass"])
def beside_olmoe(request, tiny_model, monkeypatch):
    """A sparse model, generating in either way, and OLMoE with the same function (in float32)."""
    model = tiny_model(dtype=torch.float32, mlp_routing={"policy": "top_k", "k": 2}, pad_token_id=0)
    olmoe = OlmoeForCausalLM(target_config(model.config, "olmoe", pad=False))
    olmoe.load_state_dict(target_weights(model, "olmoe", torch.float32, pad=False))
    if request.param == "forward pass":
        monkeypatch.setenv("DSMOE_KERNEL", "eager")
        reset_kernel()
    yield model, olmoe.eval()
    monkeypatch.undo()
    reset_kernel()


def generated(model, ids, **options):
    return model.generate(
        ids, max_new_tokens=6, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **options
    )


def test_generation_infers_padding_as_stock_models_do(beside_olmoe):
    ids = token_ids(3, 9)
    ids[0, :4] = ids[2, :1] = 0
    ours, theirs = (generated(model, ids).sequences for model in beside_olmoe)
    assert torch.equal(ours, theirs)
    explicit = generated(beside_olmoe[0], ids, attention_mask=(ids != 0).long()).sequences
    assert torch.equal(ours, explicit)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("more", [1, 5, 30])
def test_generation_goes_on_from_its_own_cache(beside_olmoe, with_mask, more):
    results = []
    for model in beside_olmoe:
        first = generated(model, token_ids(2, 9))
        ids = torch.cat([first.sequences, token_ids(2, more, seed=4)], dim=1)
        mask = {"attention_mask": torch.ones_like(ids)} if with_mask else {}
        anew = generated(model, ids, **mask).sequences
        results.append(generated(model, ids, past_key_values=first.past_key_values, **mask).sequences)
        assert torch.equal(results[-1], anew)
    assert torch.equal(*results)


def test_the_signature_names_what_transformers_looks_for(tiny_model):
    """HF's Trainer drops columns of a data set, and `generate` prepares no argument, that it does not find there."""
    named = inspect.signature(tiny_model().forward).parameters
    stock = inspect.signature(OlmoeForCausalLM.forward).parameters
    assert {*stock} - {"self", "output_router_logits"} <= {*named}
    ids = token_ids()
    mask = torch.ones_like(ids)
    torch.testing.assert_close(tiny_model()(ids, mask).logits, tiny_model()(ids).logits, **CLOSE)


def test_float64_stays_float64_under_autocast(tiny_model):
    """As torch's own layers have it."""
    model, ids = tiny_model(**MOA), token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(ids).logits, expected)
