"""What matters on a GPU and shows on a CPU too: waits of the host, dtypes of products, what attention is told."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

import dsmoe.model.moa as moa
from dsmoe.model import DSMoEForCausalLM, grouped
from dsmoe.model.attention import refuse_rows_of_documents
from dsmoe.model.expert_loop import looped_experts
from dsmoe.model.grouped import batched_experts

MOA = {"num_attention_experts": 2, "num_key_value_heads": 2, "head_dim": 8, "qk_norm": "per_head"}
TOP_1 = {"policy": "top_k", "k": 1}
IDS = torch.arange(12).view(2, 6)


class Waits(TorchDispatchMode):
    """Counts what has the host wait for a device: reading a tensor's value, sizes that depend on values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("overrides", [{}, {"kind": "dense", "num_experts": 1}, MOA])
def test_a_training_step_in_all_experts_mode_never_waits(tiny_model, overrides):
    model = tiny_model(dtype=torch.float32, **overrides).train()
    with Waits() as waits:
        model(IDS, labels=IDS, use_cache=False).loss.backward()
    assert waits.found == []


def test_attention_kernels_hear_of_packed_documents(tiny_config):
    """Flash attention is given no mask and finds the documents in `position_ids`."""
    heard = []

    def stub(module, query, key, value, attention_mask, **kwargs):
        heard.append(kwargs.get("position_ids"))
        return query.transpose(1, 2), None

    AttentionInterface.register("stub", stub)
    config = tiny_config()
    config._attn_implementation = "stub"
    model = DSMoEForCausalLM(config)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    model(IDS, position_ids=positions, use_cache=False)
    assert len(heard) == 2 and all(given is positions for given in heard)
    heard.clear()
    model(IDS, use_cache=False)
    assert heard == [None, None]


def test_sparse_attention_experts_compute_in_the_dtype_of_autocast(tiny_model, monkeypatch):
    """Rotary embeddings leave keys in float32 there; queries must not follow them into float32 products."""
    model = tiny_model(dtype=torch.float32, attention_routing=TOP_1, **MOA)
    seen, product = [], moa.grouped_linear

    def spy(x_PI, *rest):
        seen.append(x_PI.dtype)
        return product(x_PI, *rest)

    monkeypatch.setattr(moa, "grouped_linear", spy)
    with torch.no_grad():
        exact = model(IDS, use_cache=False).logits
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(IDS, use_cache=False).logits
    assert set(seen) == {torch.bfloat16}
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_experts_at_once_are_those_of_the_loop(mlp_type):
    """What a GPU runs in float32, with an expert that no token keeps; values and gradients."""
    generator = torch.Generator().manual_seed(0)
    wide = 2 if mlp_type == "swiglu" else 1

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    given = draw(7, 8), draw(7, 4), draw(4, 6 * wide, 8), draw(4, 6, 8)
    mask = torch.rand(7, 4, generator=generator) < 0.5
    mask[:, 2], mask[0] = False, False
    weights = torch.randn(7, 8, dtype=torch.float64, generator=generator)
    results = []
    for function in (batched_experts, looped_experts):
        y_TD = function(given[0], given[1], mask, *given[2:], mlp_type)
        results.append([y_TD, *torch.autograd.grad((y_TD * weights).sum(), given)])
    for ours, loop in zip(*results):
        torch.testing.assert_close(ours, loop, rtol=1e-12, atol=1e-12)


def test_flash_attention_and_rows_of_documents():
    """transformers looks for documents in batches of one row alone, and would silently join the others'."""
    restarting = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    plain = torch.arange(5).expand(2, 5)
    refuse = refuse_rows_of_documents
    with pytest.raises(ValueError, match="in a batch of one row only"):
        refuse("flash_attention_2", restarting, None, None)
    for given in [
        ("flash_attention_2", restarting[:1], None, None),
        ("flash_attention_2", plain, None, None),
        ("flash_attention_2", restarting, torch.ones(2, 5), None),
        ("flash_attention_2", restarting, None, object()),
        ("sdpa", restarting, None, None),
        (None, restarting, None, None),
    ]:
        refuse(*given)


def test_the_grouped_product_of_other_versions_and_gpus(monkeypatch):
    """torch 2.9 has it under another name, and GPUs before Ampere don't have it."""
    for capability, product, wanted in [
        ((8, 0), len, True),
        ((9, 0), len, True),
        ((7, 5), len, False),
        ((9, 0), None, False),
    ]:
        grouped._has_grouped_mm.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(grouped, "_grouped_mm", product)
        assert grouped._has_grouped_mm(0) is wanted
    grouped._has_grouped_mm.cache_clear()
