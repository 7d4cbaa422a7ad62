"""Router losses: known values, an autograd formula, parts of a batch against the whole, transformers' balancing."""

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dsmoe.losses import router_losses, router_statistics, statistics_values
from dsmoe.model.routing import keep_experts

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
NAMES = ("mutual_information", "load_balancing", "z_loss")


def make_logits(batch=4, length=5, experts=6, layers=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (2 * torch.randn(batch, length, experts, generator=generator, dtype=torch.float64))
        .to(dtype)
        .requires_grad_()
        for _ in range(layers)
    ]


def loads(logits, k=2):
    return [
        keep_experts(layer.detach().flatten(0, 1).softmax(-1), {"policy": "top_k", "k": k})
        for layer in logits
    ]


def direct(logits, mask, k=2):
    """The three losses as the papers write them, on all tokens at once, summed over layers."""
    total = dict.fromkeys(NAMES, 0.0)
    for layer in logits:
        real = layer.flatten(0, 1)[mask.flatten().bool()]
        probs = real.softmax(-1)
        mean = probs.mean(0)
        entropy = -(mean * mean.log()).sum()
        conditional = -(probs * probs.log()).sum(-1).mean()
        share = torch.zeros_like(mean)
        for row in probs:
            share[row.topk(k).indices] += 1 / (k * len(probs))
        total["mutual_information"] += conditional - entropy
        total["load_balancing"] += len(mean) * (share * mean).sum()
        total["z_loss"] += real.exp().sum(-1).log().square().mean()
    return total


@pytest.mark.parametrize("experts", [4, 7])
def test_known_values(experts):
    one_hot = 100 * torch.eye(experts, dtype=torch.float64) - 50
    for logits, expected in ((one_hot, -math.log(experts)), (one_hot[:1].expand(experts, -1), 0.0)):
        for dtype in (torch.float64, torch.float32):
            layer = logits[None].to(dtype).requires_grad_()
            statistics = router_statistics([layer])
            value = statistics_values(statistics)["mutual_information"]
            assert value.item() == pytest.approx(expected, abs=1e-12)
            (gradient,) = torch.autograd.grad(router_losses([layer], statistics).mutual_information, layer)
            assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-6
    uniform = torch.zeros(1, 3, experts, dtype=torch.float64)
    values = statistics_values(router_statistics([uniform]))
    assert values["mutual_information"].item() == pytest.approx(0.0, abs=1e-12)
    assert values["entropy"].item() == pytest.approx(math.log(experts))
    assert values["load_balancing"].item() == pytest.approx(1.0)
    assert values["z_loss"].item() == pytest.approx(math.log(experts) ** 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_equal_the_formula(name, padded):
    logits = make_logits()
    mask = torch.ones(4, 5, dtype=torch.long)
    if padded:
        mask[1, 2:] = mask[3, :2] = 0
    expected = direct(logits, mask)[name]
    statistics = router_statistics(logits, mask if padded else None, loads(logits))
    assert statistics.num_tokens == mask.sum()
    torch.testing.assert_close(statistics_values(statistics)[name].sum(), expected.detach(), **CLOSE)
    loss = getattr(router_losses(logits, statistics, mask if padded else None), name)
    wanted = torch.autograd.grad(expected, logits)
    for got, want in zip(torch.autograd.grad(loss, logits), wanted):
        torch.testing.assert_close(got, want, **CLOSE)
        assert (got[mask == 0] == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_parts_add_up_to_the_whole(name, dtype, tolerance):
    """Four micro-batches with the global statistics give the gradient of the whole batch."""
    logits = make_logits(batch=8, dtype=dtype)
    mask = torch.ones(8, 5, dtype=torch.long)
    mask[0, 3:] = mask[5, 1:] = 0
    whole = router_statistics(logits, mask, loads(logits))
    wanted = torch.autograd.grad(getattr(router_losses(logits, whole, mask), name), logits)
    rows = [slice(2 * part, 2 * part + 2) for part in range(4)]
    parts = [
        router_statistics(
            [x[r] for x in logits], mask[r], [k.view(8, 5, -1)[r].flatten(0, 1) for k in loads(logits)]
        )
        for r in rows
    ]
    total = parts[0] + parts[1] + parts[2] + parts[3]
    for ours, theirs in zip(total.tensors(), whole.tensors()):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    loss = sum(getattr(router_losses([x[r] for x in logits], total, mask[r]), name) for r in rows)
    for got, want in zip(torch.autograd.grad(loss, logits), wanted):
        assert (got - want).norm() / want.norm() < tolerance
    # and with the statistics of each part alone it is another gradient (z-loss has none but the count)
    local = sum(
        getattr(router_losses([x[r] for x in logits], part, mask[r]), name) / 4
        for r, part in zip(rows, parts)
    )
    gradients = torch.autograd.grad(local, logits)
    assert max((got - want).norm() / want.norm() for got, want in zip(gradients, wanted)) > 0.05


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load_balancing_equals_transformers(top_k):
    (layer,) = make_logits(layers=1)
    statistics = router_statistics([layer], None, loads([layer], top_k))
    flat = layer.flatten(0, 1)
    expected = load_balancing_loss_func((flat,), num_experts=6, top_k=top_k)
    value = statistics_values(statistics)["load_balancing"].sum()
    # theirs counts k assignments a token, ours the share of assignments
    assert top_k * value.item() == pytest.approx(expected.item(), rel=1e-6)
    (wanted,) = torch.autograd.grad(expected, layer)
    (found,) = torch.autograd.grad(router_losses([layer], statistics).load_balancing, layer)
    # they count assignments in float32
    torch.testing.assert_close(top_k * found, wanted, rtol=1e-5, atol=1e-7)


def test_flatten_and_back():
    logits = make_logits()
    statistics = router_statistics(logits, None, loads(logits))
    assert (statistics.load_LN.sum(-1) == 2 * 20).all()
    empty = router_statistics(make_logits(seed=1))
    restored = empty.unflatten(statistics.flatten())
    for ours, theirs in zip(restored.tensors(), statistics.tensors()):
        assert torch.equal(ours, theirs)


def test_mean_probs_can_be_given():
    """A running p(e) takes the place of the batch's in the gradient of the mutual information."""
    logits = make_logits(layers=1)
    mean = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.1, 0.1]], dtype=torch.float64)
    probs = logits[0].flatten(0, 1).softmax(-1)
    expected = (probs * (mean.log() - probs.log())).sum() / 20
    loss = router_losses(logits, router_statistics(logits), mean_probs_LN=mean).mutual_information
    torch.testing.assert_close(loss, expected, **CLOSE)


def test_masked_batch_is_no_error():
    logits = make_logits(layers=1)
    mask = torch.zeros(4, 5)
    statistics = router_statistics(logits, mask)
    assert all(torch.isfinite(value).all() for value in statistics_values(statistics).values())
    assert torch.isfinite(router_losses(logits, statistics, mask).mutual_information)


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_of_all_experts_is_the_sum_of_squares(padded):
    """A token that keeps all experts loads each with its p: N * sum p^2, and with loads held fixed half its gradient."""
    logits = make_logits()
    mask = torch.ones(4, 5, dtype=torch.long)
    if padded:
        mask[1, 2:] = mask[3, :2] = 0
    expected = 0
    for layer in logits:
        mean = (layer.softmax(-1) * mask[..., None]).sum((0, 1)) / mask.sum()
        expected = expected + layer.shape[-1] * (mean * mean).sum()
    statistics = router_statistics(logits, mask if padded else None)
    value = statistics_values(statistics)["load_balancing"].sum()
    torch.testing.assert_close(value, expected.detach(), **CLOSE)
    loss = router_losses(logits, statistics, mask if padded else None).load_balancing
    for got, want in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)):
        assert got.abs().max() > 0
        torch.testing.assert_close(got, want / 2, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_changes_nothing(name):
    logits = make_logits(dtype=torch.float32)
    statistics = router_statistics(logits, None, loads(logits))
    gradients = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = getattr(router_losses(logits, statistics), name)
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, logits))
    for ours, theirs in zip(*gradients):
        assert torch.equal(ours, theirs)
