"""Initial weights, drawn so that models of one seed share all that they can.

Every tensor is drawn from a generator of its own, seeded by torch's seed, the layer and the tensor's role. So a dense
twin, an SMoE and a DS-MoE of one seed start from the same values, however many routers or experts they have, and
with uniform gates of one they are the same function: comparisons between them are paired.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ROLES = (
    "embedding",
    "lm_head",
    "query",
    "key",
    "value",
    "output",
    "up",
    "down",
    "mlp_router",
    "attention_router",
)


def mark(module: nn.Module, role: str, layer_idx: int) -> None:
    """Tell a Linear or Embedding which role its weight has (see `initialise_linear`)."""
    module.initial_role = role  # type: ignore[assignment]
    module.initial_layer = layer_idx  # type: ignore[assignment]


@torch.no_grad()
def draw(
    shape: tuple[int, ...], std: float, role: str, layer_idx: int, like: Tensor, part: int = 0
) -> Tensor:
    """Normal values with mean 0.

    Args:
        shape: of the result.
        std: standard deviation.
        role: one of ROLES.
        layer_idx: the layer, 0 outside of layers.
        like: gives device and dtype.
        part: tells several tensors of one role apart.
    """
    values = torch.empty(shape, device=like.device, dtype=like.dtype)
    if values.is_meta:
        return values
    seed = torch.initial_seed() * 1_000_003 + 64 * layer_idx + 4 * ROLES.index(role) + part
    generator = torch.Generator(device=values.device).manual_seed(seed % (1 << 63))
    return values.normal_(0.0, std, generator=generator)


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, unless transformers has marked it as loaded from a checkpoint."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.copy_(value)


def initialise_linear(parameter: Tensor, std: float, role: str, layer_idx: int, part: int = 0) -> None:
    """Draw a matrix that the twins hold in the same form."""
    assign(parameter, draw(tuple(parameter.shape), std, role, layer_idx, parameter, part))


class Stored(NamedTuple):
    """Which experts of a layer have weights.

    Attributes:
        num_experts: N (or A), removed ones included: initial weights are drawn for all, whichever are stored.
        kept: the stored ones; None: all.
    """

    num_experts: int
    kept: Sequence[int] | None

    def of(self, stack: Tensor) -> Tensor:
        """The stored experts of a stack of all."""
        return stack if self.kept is None else stack[list(self.kept)]


def initialise_experts(
    input_proj: Tensor,
    down_proj: Tensor,
    gated: bool,
    stds: tuple[float, float],
    layer_idx: int,
    stored: Stored,
) -> None:
    """Draw the experts' weights in the dense twin's order (all gate rows, then all up rows) and deal them out.

    Args:
        input_proj: [N, H, D].
        down_proj: [N, F, D].
        gated: whether H is made of gate rows and up rows (swiglu).
        stds: standard deviations of the two.
        layer_idx: the layer.
        stored: which experts the two hold.
    """
    _, height, hidden = input_proj.shape
    parts = 2 if gated else 1
    shape = (parts, stored.num_experts, height // parts, hidden)
    drawn = draw(shape, stds[0], "up", layer_idx, input_proj).transpose(0, 1)
    assign(input_proj, stored.of(drawn).reshape(input_proj.shape))
    down = draw((stored.num_experts, *down_proj.shape[1:]), stds[1], "down", layer_idx, down_proj)
    assign(down_proj, stored.of(down))


def initialise_heads(
    q_proj: Tensor,
    o_proj: Tensor,
    heads_per_expert: int,
    stds: tuple[float, float],
    layer_idx: int,
    stored: Stored,
) -> None:
    """The same for attention experts: the twin's query heads stand in order of their KV head.

    Args:
        q_proj: [A, W, D].
        o_proj: [A, W, D]; the twin's is [D, A * W].
        heads_per_expert: J; W = J * head_dim.
        stds: standard deviations of the two.
        layer_idx: the layer.
        stored: which experts the two hold.
    """
    experts, (width, hidden) = stored.num_experts, q_proj.shape[1:]
    by_head = (heads_per_expert, experts, width // heads_per_expert, hidden)
    query = draw((experts * width, hidden), stds[0], "query", layer_idx, q_proj)
    output = draw((hidden, experts * width), stds[1], "output", layer_idx, o_proj).T
    assign(q_proj, stored.of(query.reshape(by_head).transpose(0, 1)).reshape(q_proj.shape))
    assign(o_proj, stored.of(output.reshape(by_head).transpose(0, 1)).reshape(o_proj.shape))
