"""What a plan has to keep to: operations, memory, tokens."""

import math
from dataclasses import dataclass, field

from dsmoe.errors import UserError
from dsmoe.planner.memory import Serving, training_parts
from dsmoe.planner.shapes import Family, largest


@dataclass(frozen=True)
class Limits:
    """Limits of a plan; None: there is none.

    Training costs 6 operations per trained parameter and token, inference 2 per active parameter and token; with
    `flops` they share one budget, so inference_tokens = 0 is plain training. `training_flops` is a budget of training
    alone.

    Args:
        flops: floating-point operations for training and inference together.
        inference_tokens: tokens that the model will process in its life.
        memory_bytes: for weights (all of them) and KV cache.
        training_memory_bytes: for weights, gradients and optimizer state.
        max_tokens: training tokens that there are.
        max_tokens_per_param: training tokens per trained parameter.
        total_params: exact wanted total; the nearest shape is taken.
        serving: KV cache and precisions.
        training_recipe: what is kept per parameter in training.
        training_flops: floating-point operations for training.
    """

    flops: float | None = None
    inference_tokens: float = 0.0
    memory_bytes: float | None = None
    training_memory_bytes: float | None = None
    max_tokens: float | None = None
    max_tokens_per_param: float | None = None
    total_params: float | None = None
    serving: Serving = field(default_factory=Serving)
    training_recipe: str = "autocast"
    training_flops: float | None = None

    def check(self) -> None:
        """Raise UserError unless both the size and the tokens are bounded."""
        operations = (self.flops, self.training_flops)
        sizes = (*operations, self.memory_bytes, self.training_memory_bytes, self.total_params)
        tokens = (*operations, self.max_tokens, self.max_tokens_per_param)
        if all(value is None for value in (*sizes, *tokens)):
            raise UserError("no limit is given: pass at least --flops, or --memory with --max-tokens")
        if all(value is None for value in tokens):
            raise UserError(
                "nothing bounds the training tokens, and more of them are always better: pass --flops, --days with --gpu "
                "(such as --gpu h100:8 --days 3), --max-tokens or --max-tokens-per-param as well"
            )
        if all(value is None for value in sizes):
            raise UserError(
                "nothing bounds the size of the model, and larger is always better: pass --flops, --memory, "
                "--training-memory or --total-params as well"
            )

    def flops_tokens(self, family: Family, hidden_size: float) -> float:
        """Training tokens that `flops` allows at that size; not positive if inference alone exceeds it."""
        if self.flops is None:
            return math.inf
        left = self.flops - 2 * family.num_params_active(hidden_size) * self.inference_tokens
        return left / (6 * family.num_params_trained(hidden_size))

    def tokens(self, family: Family, hidden_size: float) -> tuple[float, list[str]]:
        """The most training tokens at that size, which are always the best, and what bounds them."""
        trained = family.num_params_trained(hidden_size)
        bounds = {
            "flops": self.flops_tokens(family, hidden_size),
            "training_flops": math.inf
            if self.training_flops is None
            else self.training_flops / (6 * trained),
            "tokens": math.inf if self.max_tokens is None else self.max_tokens,
            "tokens_per_param": math.inf
            if self.max_tokens_per_param is None
            else self.max_tokens_per_param * trained,
        }
        least = min(bounds.values())
        return least, [name for name, bound in bounds.items() if bound <= least * (1 + 1e-6)]

    def largest_hidden_size(self, family: Family) -> tuple[float, str]:
        """The largest real d within the limits on memory and operations, and the name of what bounds it."""
        bounds = {}
        if self.memory_bytes is not None:
            bounds["memory"] = largest(lambda d: self.serving.total_bytes(family, d), self.memory_bytes)
        if self.training_memory_bytes is not None:
            bounds["training_memory"] = largest(
                lambda d: sum(training_parts(family, d, self.training_recipe).values()),
                self.training_memory_bytes,
            )
        if self.flops is not None:  # at least one token is left for training
            bounds["flops"] = largest(
                lambda d: (
                    6 * family.num_params_trained(d) + 2 * family.num_params_active(d) * self.inference_tokens
                ),
                self.flops,
            )
        if self.training_flops is not None:
            bounds["training_flops"] = largest(
                lambda d: 6 * family.num_params_trained(d), self.training_flops
            )
        if not bounds:
            return math.inf, ""
        name = min(bounds, key=lambda key: bounds[key])
        return bounds[name], name

    def fits(self, family: Family, hidden_size: float) -> bool:
        """Whether that size keeps every limit and leaves at least one token to train on."""
        within = self.memory_bytes is None or (
            self.serving.total_bytes(family, hidden_size) <= self.memory_bytes
        )
        state = sum(training_parts(family, hidden_size, self.training_recipe).values())
        within = within and (self.training_memory_bytes is None or state <= self.training_memory_bytes)
        return within and self.tokens(family, hidden_size)[0] >= 1
