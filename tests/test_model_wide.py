"""The wide dense path: recompute, blocks of tokens, both layouts of the output projections; against a naive loop."""

import weakref

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.model import set_recompute, wide
from dsmoe.model.wide import _blocks, wide_experts

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def leaves(mlp_type="swiglu", gated=True, num_tokens=7, dtype=torch.float64):
    """x [T, D], gates [T, N] or None, up [N, H, D], down [N, F, D]."""
    generator = torch.Generator().manual_seed(0)
    width = 10 if mlp_type == "swiglu" else 5
    shapes = ((num_tokens, 4), (num_tokens, 3), (3, width, 4), (3, 5, 4))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    if not gated:
        made[1] = None
    return [None if tensor is None else tensor.requires_grad_() for tensor in made]


def loop(x, gates, up, down, mlp_type):
    total = 0
    for expert in range(up.shape[0]):
        h = x @ up[expert].T
        if mlp_type == "swiglu":
            gate, linear = h.chunk(2, -1)
            act = functional.silu(gate) * linear
        else:
            act = functional.gelu(h)
        out = act @ down[expert]
        total = total + (out if gates is None else gates[:, expert, None] * out)
    return total


def assert_same(actual, expected, wanted):
    torch.testing.assert_close(actual, expected, **CLOSE)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    got = torch.autograd.grad(actual, wanted, cotangent)
    for a, b in zip(got, torch.autograd.grad(expected, wanted, cotangent), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("block_tokens", [1, 3, 7, 50])
def test_equals_the_loop(mlp_type, gated, recompute, block_tokens):
    given = leaves(mlp_type, gated)
    actual = wide_experts(*given, mlp_type, recompute=recompute, block_tokens=block_tokens)
    assert_same(actual, loop(*given, mlp_type), [tensor for tensor in given if tensor is not None])


@pytest.mark.parametrize("frozen", [[0], [1], [2], [3], [0, 1, 2], [0, 2, 3], [2, 3]], ids=str)
@pytest.mark.parametrize("recompute", [True, False])
def test_what_needs_no_gradient_gets_none(frozen, recompute):
    given = leaves()
    for index in frozen:
        given[index].requires_grad_(False)
    wanted = [tensor for tensor in given if tensor.requires_grad]
    actual = wide_experts(*given, "swiglu", recompute=recompute, block_tokens=3)
    assert_same(actual, loop(*given, "swiglu"), wanted)
    wide_experts(*given, "swiglu", recompute=recompute, block_tokens=3).sum().backward()
    assert all(given[index].grad is None for index in frozen)


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("down_layout", ["NFD", "NDF"])
def test_gradcheck_with_recompute(mlp_type, gated, down_layout):
    x, gates, up, down = leaves(mlp_type, gated, num_tokens=5)
    if down_layout == "NDF":
        down = down.detach().transpose(1, 2).contiguous().requires_grad_()

    def function(x, gates, up, down):
        return wide_experts(
            x, gates, up, down, mlp_type, down_layout=down_layout, recompute=True, block_tokens=2
        )

    assert torch.autograd.gradcheck(function, (x, gates, up, down))


@pytest.mark.parametrize("recompute", [True, False])
def test_down_as_transformers_stores_it(recompute):
    x, gates, up, down = leaves()
    stored = down.detach().transpose(1, 2).contiguous().requires_grad_()
    actual = wide_experts(
        x, gates, up, stored, "swiglu", down_layout="NDF", recompute=recompute, block_tokens=3
    )
    assert_same(actual, loop(x, gates, up, stored.transpose(1, 2), "swiglu"), [x, gates, up, stored])


@pytest.mark.parametrize("recompute", [True, False])
def test_bfloat16_gradients_are_summed_in_float32(recompute):
    """Sums over blocks don't round at each block: many blocks are as near to float64 as one."""
    given = [tensor.detach() for tensor in leaves(num_tokens=512, dtype=torch.bfloat16)]

    def up_gradient(dtype, block_tokens):
        x, gates, up, down = (tensor.to(dtype) for tensor in given)
        up.requires_grad_()
        y = wide_experts(x, gates, up, down, "swiglu", recompute=recompute, block_tokens=block_tokens)
        return torch.autograd.grad(y.float().sum(), up)[0].double()

    exact = up_gradient(torch.float64, 512)
    errors = [(up_gradient(torch.bfloat16, block) - exact).norm() / exact.norm() for block in (512, 8)]
    assert errors[1] < 1.5 * errors[0] + 1e-3


def test_autocast_keeps_float32_gradients():
    given = leaves(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wide_experts(*given, "swiglu", recompute=True, block_tokens=3)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().square().sum(), given)
    exact = torch.autograd.grad(loop(*given, "swiglu").square().sum(), given)
    for got, want in zip(gradients, exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.05 * want.norm()


def saved_elements(function):
    """Elements that autograd keeps, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()  # kept: storages freed inside would give their addresses to others
    return y, sum(storages.values())


def test_recompute_saves_its_inputs_alone():
    given = leaves(num_tokens=40)
    inputs = sum(tensor.numel() for tensor in given)
    y, with_recompute = saved_elements(lambda: wide_experts(*given, "swiglu", recompute=True, block_tokens=9))
    z, without = saved_elements(lambda: wide_experts(*given, "swiglu", block_tokens=9))
    assert with_recompute == inputs
    assert without == inputs + 40 * 3 * 10
    assert y.shape == z.shape
    with torch.no_grad():
        assert not wide_experts(*given, "swiglu", block_tokens=9).requires_grad


def test_backward_twice_gives_the_same():
    """Nothing that is saved may be written over."""
    given = leaves()
    for recompute in (True, False):
        y = wide_experts(*given, "swiglu", recompute=recompute, block_tokens=3).sum()
        first = torch.autograd.grad(y, given, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, given)))


@pytest.mark.parametrize(("tokens", "size"), [(0, 4), (1, 4), (4, 4), (5, 4), (2049, 1024), (13, 5)])
def test_blocks_cover_the_tokens(tokens, size):
    rows = [row for block in _blocks(tokens, size) for row in range(tokens)[block]]
    assert rows == list(range(tokens))
    sizes = [block.stop - block.start for block in _blocks(tokens, size)]
    assert max(sizes) <= size
    assert len(sizes) == max(1, -(-tokens // size))


def test_no_tokens():
    given = leaves(num_tokens=0)
    y = wide_experts(*given, "swiglu", recompute=True)
    gradients = torch.autograd.grad(y.sum(), given)
    assert y.shape == (0, 4)
    assert [g.shape for g in gradients] == [t.shape for t in given]
    assert not any(g.abs().sum() for g in gradients)


@pytest.mark.parametrize("block_tokens", [40, 9])
def test_operations_by_hand(block_tokens):
    """9 products of T * D * W (11 with recompute), whatever the blocks."""
    given = leaves(num_tokens=40)
    for recompute, products in ((False, 9), (True, 11)):
        with FlopCounterMode(display=False) as counter:
            wide_experts(*given, "swiglu", recompute=recompute, block_tokens=block_tokens).sum().backward()
        assert counter.get_total_flops() == products * 2 * 40 * 4 * 15


def test_set_recompute(tiny_model):
    model = tiny_model()
    ids = torch.arange(12).view(2, 6)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    assert set_recompute(model, True) == 2
    assert all(layer.mlp.experts.recompute for layer in model.model.layers)
    for a, b in zip(torch.autograd.grad(model(ids, labels=ids).loss, parameters), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    set_recompute(model, False)
    assert not model.model.layers[0].mlp.experts.recompute


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients_no_block_outlives_its_turn(monkeypatch, grad):
    """The inputs of an autograd.Function ask for gradients where torch.no_grad() says that there are none."""
    x, gates, up, down = leaves(num_tokens=12, dtype=torch.float32)
    activation, alive, most = wide.gated_activation, weakref.WeakSet(), []

    def noted(h, *rest):
        alive.add(h)
        most.append(len(alive))
        return activation(h, *rest)

    monkeypatch.setattr(wide, "gated_activation", noted)
    monkeypatch.setattr(wide, "inference_experts", lambda *rest: None)
    with torch.set_grad_enabled(grad):
        wide_experts(x, gates, up, down, "swiglu", block_tokens=3)
    assert len(most) == 4 and max(most) == (4 if grad else 1)
