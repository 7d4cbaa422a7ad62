"""Rotary position embedding (RoPE), in the half-split form that transformers' Llama and OLMoE use."""

import torch
from torch import Tensor, nn

from dsmoe.config import DSMoEConfig


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotation angles. Source: arXiv 2104.09864.

    Raises:
        UserError: as `DSMoEConfig.check_rope`.
    """

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__()
        config.check_rope()  # `from_pretrained(folder, rope_parameters=...)` sets it in a config that was checked before
        self.head_dim = config.head_dim
        self.theta = config.rope_parameters["rope_theta"]

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, S, head_dim] in the dtype of x, for positions [B, S].

        The frequencies are computed here, in float32: a buffer of them would be rounded by a cast of the model.
        """
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device) / self.head_dim
        angles = position_ids[..., None].float() * (1.0 / self.theta**exponent)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, heads, S, head_dim] by the angles of its positions [B, S, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
