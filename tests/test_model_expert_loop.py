"""Kept pairs, and the loop over experts that trains them, against plain definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dsmoe.model import grouped
from dsmoe.model.expert_loop import looped_experts
from dsmoe.model.kernels import reset_kernel, selection
from dsmoe.model.pairs import blocks, kept_pairs, padded, padded_pairs, sum_of_pairs

MLP_TYPES = ("swiglu", "gelu")


@pytest.fixture(autouse=True, params=["auto", "eager"])
def kernel(request, monkeypatch):
    monkeypatch.setenv(selection.VARIABLE, request.param)
    reset_kernel()
    yield
    reset_kernel()


def layer(num_tokens, num_experts, width, hidden, mlp_type, dtype=torch.float64, seed=0):
    """x, gates, mask (expert 0 is kept by nobody, token 0 keeps none), up, down; all but the mask want gradients."""
    generator = torch.Generator().manual_seed(seed)
    h_width = 2 * width if mlp_type == "swiglu" else width
    shapes = (
        (num_tokens, hidden),
        (num_tokens, num_experts),
        (num_experts, h_width, hidden),
        (num_experts, width, hidden),
    )
    tensors = [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]
    mask = torch.rand(num_tokens, num_experts, generator=generator) < 0.5
    mask[:, 0] = False
    mask[:1] = False
    return tensors[0], tensors[1], mask, *tensors[2:]


def definition(x, gates, mask, up, down, mlp_type):
    """All experts of all tokens; those that are dropped times zero."""
    h = torch.einsum("td,nhd->tnh", x, up)
    if mlp_type == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        act = functional.silu(gate) * value
    else:
        act = functional.gelu(h)
    return torch.einsum("tnf,nfd,tn->td", act, down, gates * mask)


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
def test_values_and_gradients_equal_the_definition(mlp_type):
    x, gates, mask, up, down = layer(50, 5, 3, 7, mlp_type)
    wanted = definition(x, gates, mask, up, down, mlp_type)
    actual = looped_experts(x, gates, mask, up, down, mlp_type)
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    inputs = (x, gates, up, down)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(wanted, inputs, cotangent)
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("mlp_type", MLP_TYPES)
def test_both_ways_of_training_equal_the_definition(mlp_type, faster, monkeypatch):
    """The loop, and the wide product with gates of zero; of dropped pairs neither reads the gate."""
    x, gates, mask, up, down = layer(50, 5, 3, 7, mlp_type)
    wanted = definition(x, gates, mask, up, down, mlp_type)
    asked = []
    monkeypatch.setattr(grouped, "wide_is_faster", lambda *given: asked.append(given) or faster)
    spoilt = gates.detach().where(mask, float("nan")).requires_grad_()
    actual = grouped.grouped_experts(x, spoilt, mask, up, down, mlp_type)
    assert asked == [(mask.double().mean().item(), 3, torch.float64)]
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(wanted.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad(actual, (x, spoilt, up, down), cotangent)
    for got, want in zip(found, torch.autograd.grad(wanted, (x, gates, up, down), cotangent)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_rule_for_narrow_experts():
    """At the widths that save time the kept experts alone are computed; at narrow ones the share decides."""
    assert not any(
        grouped.wide_is_faster(share, 128, dtype)
        for share in (0.1, 0.34, 0.5)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert grouped.wide_is_faster(0.34, 16, torch.bfloat16)
    assert not grouped.wide_is_faster(0.1, 16, torch.bfloat16)
    assert not grouped.wide_is_faster(0.34, 16, torch.float32)


@pytest.mark.parametrize("mlp_type", MLP_TYPES)
def test_gradcheck(mlp_type):
    x, gates, mask, up, down = layer(4, 3, 2, 3, mlp_type)
    assert torch.autograd.gradcheck(
        lambda *given: looped_experts(given[0], given[1], mask, given[2], given[3], mlp_type),
        (x, gates, up, down),
    )


@pytest.mark.parametrize("frozen", range(4))
def test_what_needs_no_gradient_gets_none(frozen):
    x, gates, mask, up, down = layer(20, 4, 3, 5, "swiglu")
    inputs = [x, gates, up, down]
    inputs[frozen].requires_grad_(False)
    wanted = torch.autograd.grad(
        definition(x, gates, mask, up, down, "swiglu").sum(), [t for t in inputs if t.requires_grad]
    )
    looped_experts(x, gates, mask, up, down, "swiglu").sum().backward()
    assert inputs[frozen].grad is None
    for got, want in zip([t.grad for t in inputs if t.requires_grad], wanted):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_lower_precision_are_near_the_definition(dtype):
    x, gates, mask, up, down = layer(300, 6, 24, 32, "swiglu", torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (x, gates, up, down)]
    definition(exact[0], exact[1], mask, exact[2], exact[3], "swiglu").square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = looped_experts(x.to(dtype), gates, mask, up, down, "swiglu")
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for got, want in zip((x, gates, up, down), exact):
        assert got.grad.dtype == torch.float32
        error = (got.grad.double() - want.grad).norm() / want.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_tokens_and_no_pairs(num_tokens, kept):
    x, gates, mask, up, down = layer(num_tokens, 2, 3, 4, "swiglu")
    mask = torch.full_like(mask, kept)
    y = looped_experts(x, gates, mask, up, down, "swiglu")
    torch.testing.assert_close(y, definition(x, gates, mask, up, down, "swiglu"))
    y.sum().backward()
    assert x.grad.shape == x.shape and gates.grad.shape == gates.shape
    if not (kept and num_tokens):
        assert not up.grad.any() and not down.grad.any()


def test_gates_of_dropped_pairs_are_not_read():
    x, gates, mask, up, down = layer(20, 4, 3, 5, "swiglu")
    spoilt = gates.detach().where(mask, float("nan")).requires_grad_()
    y = looped_experts(x, spoilt, mask, up, down, "swiglu")
    assert torch.equal(y, looped_experts(x, gates, mask, up, down, "swiglu"))
    y.sum().backward()
    assert torch.equal(spoilt.grad != 0, mask) and not x.grad.isnan().any()


def test_backward_twice_gives_the_same():
    x, gates, mask, up, down = layer(20, 4, 3, 5, "swiglu", torch.float32)
    y = looped_experts(x, gates, mask, up, down, "swiglu").sum()
    first = torch.autograd.grad(y, (x, gates, up, down), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(y, (x, gates, up, down))):
        assert torch.equal(one, other)


def test_operations_are_those_of_the_kept_pairs():
    x, gates, mask, up, down = layer(30, 4, 3, 5, "swiglu", torch.float32)
    with FlopCounterMode(display=False) as counter:
        looped_experts(x, gates, mask, up, down, "swiglu").sum().backward()
    rows = sum(padded(count) for count in mask.sum(0).tolist())
    assert counter.get_total_flops() == 9 * 2 * rows * 3 * 5  # nine products of 2 F D a row


def test_saved_is_what_the_pairs_need():
    x, gates, mask, up, down = layer(64, 4, 8, 64, "swiglu", torch.float32)
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        looped_experts(x, gates, mask, up, down, "swiglu")
    pairs, rows = int(mask.sum()), sum(padded(count) for count in mask.sum(0).tolist())
    activations = sum(sizes.values()) - up.nbytes - down.nbytes
    # tokens, mask, begins; per pair its place; per row a token (8 bytes), gate and 16 pre-activations
    assert activations == x.nbytes + mask.nbytes + 64 * 4 + pairs * 4 + rows * (8 + 4 + 16 * 4)


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(0, 40), num_experts=st.integers(1, 6), seed=st.integers(0, 99))
def test_pairs_are_sorted_and_summed_by_token(num_tokens, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_tokens, num_experts, generator=generator) < 0.6
    token_P, expert_P, counts_N = kept_pairs(mask)
    expected = [(e, t) for e in range(num_experts) for t in range(num_tokens) if mask[t, e]]
    assert list(zip(expert_P.tolist(), token_P.tolist())) == expected
    assert sum(rows.stop - rows.start for _, rows in blocks(counts_N.tolist())) == len(expected)

    pairs = padded_pairs(mask)
    assert pairs.counts == [padded(count) for count in counts_N.tolist()]
    for expert, rows in blocks(pairs.counts):
        own = mask[:, expert].nonzero()[:, 0]
        assert torch.equal(pairs.token_R[rows][: len(own)], own)
        assert set(pairs.token_R[rows].tolist()) == set(own.tolist())
    y_RD = torch.randn(len(pairs.token_R), 3, generator=generator, dtype=torch.float64)
    rows = torch.cat([torch.arange(rows.start, rows.stop)[: int(counts_N[e])] for e, rows in blocks(pairs.counts)]
                     or [torch.zeros(0, dtype=torch.int64)])  # fmt: skip
    total = torch.zeros(num_tokens, 3, dtype=torch.float64).index_add(0, token_P, y_RD[rows])
    torch.testing.assert_close(sum_of_pairs(y_RD, pairs.place_P, pairs.begin_T), total)


@given(count=st.integers(0, 1 << 20))
def test_padding_is_small_and_sizes_are_few(count):
    assert count <= padded(count) <= max(count, count * 9 // 8)
    assert padded(padded(count)) == padded(count)


@pytest.mark.parametrize("bits", [3, 6, 10])
def test_sizes_between_powers_of_two(bits):
    assert len({padded(count) for count in range(2**bits + 1, 2 ** (bits + 1) + 1)}) == 8


def test_a_token_that_is_not_finite_stays_alone():
    """Padding repeats tokens of the expert, never those of others."""
    x, gates, mask, up, down = layer(21, 4, 3, 5, "swiglu", torch.float32)
    mask[0], mask[1:, 3] = False, True
    mask[0, 1] = True
    with torch.no_grad():
        x[0] = float("inf")
    y = looped_experts(x, gates, mask, up, down, "swiglu")
    assert not y[0].isfinite().all() and y[1:].isfinite().all()
    y[1:].sum().backward()
    assert all(tensor.grad[2:].isfinite().all() for tensor in (up, down))


@pytest.mark.parametrize("hidden", [1, 7, 64])
def test_sums_of_bfloat16_are_taken_in_float32(hidden):
    # 1 + 255 * 2^-9 loses all its small terms where it is added up in bfloat16
    rows = torch.full((256, hidden), 2.0**-9, dtype=torch.bfloat16)
    rows[0] = 1
    pairs = padded_pairs(torch.ones(1, 256, dtype=torch.bool))
    total = sum_of_pairs(rows, pairs.place_P, pairs.begin_T)
    assert total.dtype == torch.bfloat16
    assert torch.equal(total, torch.full((1, hidden), 1 + 255 * 2.0**-9).bfloat16())
