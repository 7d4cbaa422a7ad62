"""The output projection of gated heads against its formula."""

import pytest
import torch

from dsmoe.model.gated_projection import gated_projection


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 3, 4), (5, 3), (3, 4, 6))
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


def formula(heads, gates, weight):
    return torch.einsum("taw,ta,awd->td", heads, gates, weight)


@pytest.mark.parametrize("frozen", [[], [0], [1], [2], [0, 1], [0, 2]], ids=str)
def test_equals_its_formula(frozen):
    given = leaves()
    for index in frozen:
        given[index].requires_grad_(False)
    wanted = [tensor for tensor in given if tensor.requires_grad]
    actual, expected = gated_projection(*given), formula(*given)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(actual, wanted, cotangent), torch.autograd.grad(expected, wanted, cotangent)
    )


def test_gradcheck():
    assert torch.autograd.gradcheck(gated_projection, leaves())


def test_autocast():
    given = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gated_projection(*given)
    assert y.dtype == torch.bfloat16
    for got, want in zip(
        torch.autograd.grad(y.float().sum(), given), torch.autograd.grad(formula(*given).sum(), given)
    ):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.02 * want.norm()
