"""Learning rate and batch of a planned model: rules of thumb, not optima."""

import math

from dsmoe.planner.shapes import Family

SMALLEST_BATCH, LARGEST_BATCH = 2**16, 2**18  # tokens; the law's runs lie between
WANTED_STEPS = 20_000


def learning_rate(family: Family, hidden_size: float) -> float:
    """Peak learning rate, exp(8.39 - 0.81 ln N - 0.25 ln E), N without embeddings.

    A DS-MoE is trained densely, so it gets the dense rule at its total size (our choice).

    Source: arXiv 2502.05172, experimental setup.
    """
    num_experts = family.num_experts if family.kind == "smoe" else 1
    log_params = math.log(family.num_params_non_embedding(hidden_size))
    return math.exp(8.39 - 0.81 * log_params - 0.25 * math.log(num_experts))


def batch_tokens(tokens: float) -> int:
    """Tokens of a batch: the power of two between 64K and 256K that gives about 20,000 steps.

    The range is that of the law's runs (arXiv 2502.05172); the rule inside it is our choice. Larger runs use larger
    batches in practice, for speed.
    """
    wanted = tokens / WANTED_STEPS
    power = 2 ** round(math.log2(max(wanted, 1)))
    return min(max(power, SMALLEST_BATCH), LARGEST_BATCH)
