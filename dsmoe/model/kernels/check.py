"""Does a kernel give the numbers of `eager` on this machine? Every other kernel is asked before it is used."""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsmoe.model.kernels import eager

# largest error over the largest value; bfloat16 rounds to 2^-9, and eager rounds several times
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class KernelUnavailable(Exception):
    """A kernel cannot be used here; the message says why in one line."""


def against_eager(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple],
    device_type: str,
    dtypes: Iterable[torch.dtype],
    mlp_types: Iterable[str] = ("swiglu", "gelu"),
    gated: Iterable[bool] = (True, False),
) -> None:
    """Compare a kernel with `eager` in float64 on a small input of each combination.

    Args:
        forward: stands for `eager.forward`.
        backward: stands for `eager.backward`.
        device_type: "cpu", "cuda", ...
        dtypes: of the tensors.
        mlp_types: "swiglu", "gelu".
        gated: with gates, without.

    Raises:
        KernelUnavailable: names the case and its error.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype, mlp_type, has_gates in itertools.product(dtypes, mlp_types, gated):
        shapes = ((5, 3, 17), (5, 3, 34 if mlp_type == "swiglu" else 17), (5, 3))
        grad, h, gates = (_normal(shape, generator).to(device_type, dtype) for shape in shapes)
        given = gates if has_gates else None
        expected = _values(eager.forward, eager.backward, grad.double(), h.double(), given, mlp_type)
        actual = _values(forward, backward, grad, h, given, mlp_type)
        error = max(_error(a, e) for a, e in zip(actual, expected))
        if not error < _TOLERANCES[dtype]:
            raise KernelUnavailable(f"its numbers are wrong here ({mlp_type}, {dtype}: error {error:.1e})")


def experts_definition(
    x_TD: Tensor,
    gates_TN: Tensor | None,
    expert_mask_TN: Tensor | None,
    up_NHD: Tensor,
    down_NFD: Tensor,
    mlp_type: str,
) -> Tensor:
    """What `inference.forward` stands for, in float64: all experts of all tokens, dropped ones times zero."""
    shape = (x_TD.shape[0], up_NHD.shape[0])
    gates = torch.ones(shape, dtype=torch.float64, device="cpu") if gates_TN is None else gates_TN.double()
    if expert_mask_TN is not None:
        gates = gates.where(expert_mask_TN, 0.0)
    h_TNH = torch.einsum("td,nhd->tnh", x_TD.double(), up_NHD.double())
    return torch.einsum("tnf,nfd->td", eager.forward(h_TNH, gates, mlp_type), down_NFD.double())


def experts_against_definition(forward: Callable[..., Tensor], dtypes: Iterable[torch.dtype]) -> None:
    """Compare an expert kernel with its definition, with few and many tokens and sizes that are no round numbers.

    Args:
        forward: stands for `inference.forward`.
        dtypes: of the tensors.

    Raises:
        KernelUnavailable: names the case and its error.
    """
    generator = torch.Generator().manual_seed(0)
    num_experts, width, hidden = 3, 13, 70
    for dtype, mlp_type, tokens in itertools.product(dtypes, ("swiglu", "gelu"), (2, 23)):
        h_width = 2 * width if mlp_type == "swiglu" else width
        shapes = ((tokens, hidden), (num_experts, h_width, hidden), (num_experts, width, hidden))
        x, up, down = (_normal(shape, generator).to(dtype) for shape in shapes)
        gates = _normal((tokens, num_experts), generator)
        for mask in (None, gates > -0.5):
            given = (x, gates, mask, up / hidden**0.5, down, mlp_type)
            error = _error(forward(*given), experts_definition(*given))
            if not error < _TOLERANCES[dtype]:
                raise KernelUnavailable(
                    f"its numbers are wrong here ({mlp_type}, {dtype}: error {error:.1e})"
                )


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # device and dtype are given in full: defaults may have been changed around the first use
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _values(forward, backward, grad: Tensor, h: Tensor, gates: Tensor | None, mlp_type: str) -> list[Tensor]:
    gates = None if gates is None else gates.to(h.dtype)
    values = [forward(h, gates, mlp_type), *backward(grad.clone(), h, gates, mlp_type)]
    return [value for value in values if value is not None]


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
