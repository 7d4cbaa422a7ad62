"""The best size and number of tokens under limits: closed form, exact search over the size, nearest real shape.

At a given size more tokens are always better, so the tokens follow from the size and one search over log d is left.
Loss is convex in log N along every limit (each term is exp of a convex function of log N), hence one minimum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dsmoe.planner.laws import ReducedLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.shapes import HEAD_DIM, Family

SizedLoss = Callable[[float, float], float]  # (trained parameters, tokens) -> nats per token
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Optimum:
    """A size with its tokens.

    Args:
        hidden_size: d; whole in a real shape.
        tokens: training tokens.
        loss: nats per token.
        binding: names of the limits that hold it.
    """

    hidden_size: float
    tokens: float
    loss: float
    binding: tuple[str, ...]


def closed_form(law: ReducedLaw, flops: float) -> tuple[float, float]:
    """Compute-optimal (N, D) with 6 N D = flops.

    From m |mu| N**mu = n |nu| D**nu. The exponents of the law are negative and their MAGNITUDES enter: with the signed
    ones the powers invert.

    Source: arXiv 2203.15556, equation 4, with the names of arXiv 2502.05172.
    """
    mu, nu = abs(law.mu), abs(law.nu)
    scale = (mu * law.m / (nu * law.n)) ** (1 / (mu + nu))
    num_params = scale * (flops / 6) ** (nu / (mu + nu))
    return num_params, flops / 6 / num_params


def optimal_tokens(law: ReducedLaw, num_params: float) -> float:
    """Tokens D at which `num_params` is the compute-optimal size."""
    return (law.m * abs(law.mu) * num_params**law.mu / (law.n * abs(law.nu))) ** (1 / law.nu)


def minimise(function: Callable[[float], float], low: float, high: float) -> float:
    """Argument of the minimum of a unimodal function on [low, high] by golden section, ends included."""
    start, end = low, high
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-11 * max(1.0, abs(high)):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
    return min(((low + high) / 2, start, end), key=function)


def optimise(family: Family, loss: SizedLoss, limits: Limits) -> Optimum | None:
    """The exact optimum over real d; None if no size above zero keeps the limits."""
    if limits.total_params is not None:
        hidden_size = family.hidden_size_of(limits.total_params)
        if not limits.fits(family, hidden_size):
            return None
        tokens, binding = limits.tokens(family, hidden_size)
        value = loss(family.num_params_trained(hidden_size), tokens)
        return Optimum(hidden_size, tokens, value, ("total_params", *binding))
    largest, bound = limits.largest_hidden_size(family)
    if largest <= 1:
        return None
    hidden_size = _search(family, loss, limits, largest)
    tokens, binding = limits.tokens(family, hidden_size)
    if hidden_size >= largest * (1 - 1e-9) and bound not in binding:
        binding = [*binding, bound]
    value = loss(family.num_params_trained(hidden_size), tokens)
    return Optimum(hidden_size, tokens, value, tuple(binding))


def _search(family: Family, loss: SizedLoss, limits: Limits, largest: float) -> float:
    def at(log_hidden_size: float) -> float:
        hidden_size = min(math.exp(log_hidden_size), largest)
        tokens, _ = limits.tokens(family, hidden_size)
        return loss(family.num_params_trained(hidden_size), max(tokens, 1e-3))

    return min(math.exp(minimise(at, 0.0, math.log(largest))), largest)


def nearest_shape(family: Family, loss: SizedLoss, limits: Limits, optimum: Optimum) -> Optimum | None:
    """The best real shape: one of the two multiples of `Family.step` around the optimum that keep the limits.

    With `total_params` fixed it is the shape whose total is nearest. None if no real shape keeps the limits, or if that
    total is nearer to nothing than to the smallest shape.
    """
    step = family.step
    below = math.floor(optimum.hidden_size / step + 1e-9) * step
    around = [hidden_size for hidden_size in (below, below + step) if hidden_size >= HEAD_DIM]
    if limits.total_params is not None:
        wanted = limits.total_params
        if too_small(family, wanted):
            return None
        around = [min(around, key=lambda d: abs(math.log(family.num_params_total(d) / wanted)))]
    made = []
    for hidden_size in around:
        if limits.fits(family, hidden_size):
            tokens, _ = limits.tokens(family, hidden_size)
            value = loss(family.num_params_trained(hidden_size), tokens)
            made.append(Optimum(hidden_size, tokens, value, optimum.binding))
    return min(made, key=lambda found: found.loss, default=None)


def too_small(family: Family, total_params: float) -> bool:
    """Whether the smallest shape that can be built has more than twice that many parameters."""
    return family.num_params_total(family.step) > 2 * total_params


def real_optimum(family: Family, loss: SizedLoss, limits: Limits) -> Optimum | None:
    """The best shape that can be built; None if no shape keeps the limits."""
    optimum = optimise(family, loss, limits)
    return None if optimum is None else nearest_shape(family, loss, limits, optimum)
