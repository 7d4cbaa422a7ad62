"""From logits to the next token.

Shapes: B batch, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dsmoe.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it; 0: the most likely token, always.
        top_k: only so many most likely tokens may be drawn; None: all.
        top_p: only the smallest set of most likely tokens whose probability reaches it; None: all.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(
                f"top_p is {self.top_p}; it must be above 0 and at most 1, or None for all tokens"
            )

    def choose(self, logits_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The next token [B] int64 of each sequence."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        # one draw for each sequence; torch.multinomial draws one for each token of the vocabulary
        shares_BV = self.probabilities(logits_BV).cumsum(-1, dtype=torch.float64)
        total_B1 = shares_BV[:, -1:]
        draws_B1 = (
            torch.rand(total_B1.shape, dtype=total_B1.dtype, device=total_B1.device, generator=generator)
            * total_B1
        )
        draws_B1 = torch.minimum(draws_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
        return torch.searchsorted(shares_BV, draws_B1, right=True)[:, 0]

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """What tokens are drawn with, [B, V]; temperature first, then top_k, then top_p, as transformers has it."""
        scores = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            lowest = scores.topk(self.top_k, -1).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(-1, descending=True)
            shares = ordered.softmax(-1)
            dropped = shares.cumsum(-1) - shares >= self.top_p
            dropped[:, 0] = False
            scores = scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
        return scores.softmax(-1)
