"""Learning rate and batch of a planned model: rules of thumb, not optima."""

import math

from dsmoe.planner.laws import PUBLISHED_RANGE
from dsmoe.planner.shapes import Family
from dsmoe.planner.units import format_count

SEQUENCE_LENGTH = 2048  # of the configurations that a plan writes; a batch is at least one sequence
SMALLEST_BATCH, LARGEST_BATCH = 2**16, 2**18  # tokens; the law's runs lie between
WANTED_STEPS = 20_000
FEWEST_STEPS = 100  # below this a schedule with warm-up and decay means little

# The source names no range of its own for the learning rate's rule; that of its runs is taken.
RULE_PARAMS, RULE_EXPERTS = PUBLISHED_RANGE["num_params_active"], PUBLISHED_RANGE["num_experts"]


def _within(value: float, ends: tuple[float, float]) -> float:
    return min(max(value, ends[0]), ends[1])


def _rule_arguments(family: Family, hidden_size: float) -> tuple[float, float]:
    """N without embeddings and E; a DS-MoE is trained densely, so the dense rule at its total size (our choice)."""
    return family.num_params_non_embedding(hidden_size), family.num_experts if family.kind == "smoe" else 1


def learning_rate(family: Family, hidden_size: float) -> float:
    """Peak learning rate, exp(8.39 - 0.81 ln N - 0.25 ln E), N without embeddings.

    Outside the runs behind the rule its nearest value inside is taken: the power law goes to 0.65 for a model of d = 64,
    and to 3e-6 for one of 200B parameters.

    Source: arXiv 2502.05172, experimental setup.
    """
    num_params, num_experts = _rule_arguments(family, hidden_size)
    log_params = math.log(_within(num_params, RULE_PARAMS))
    return math.exp(8.39 - 0.81 * log_params - 0.25 * math.log(_within(num_experts, RULE_EXPERTS)))


def batch_tokens(tokens: float) -> int:
    """Tokens of a batch: the power of two between 64K and 256K that gives about 20,000 steps.

    The range is that of the law's runs (arXiv 2502.05172); the rule inside it is our choice. Larger runs use larger
    batches in practice, for speed. Where 64K tokens would leave fewer than 100 steps the batch is smaller, down to one
    sequence.
    """
    wanted = 2 ** round(math.log2(max(tokens / WANTED_STEPS, 1)))
    most = 2 ** math.floor(math.log2(max(tokens / FEWEST_STEPS, 1)))
    return max(min(max(wanted, SMALLEST_BATCH), LARGEST_BATCH, most), SEQUENCE_LENGTH)


def recipe_notes(family: Family, hidden_size: float, tokens: float) -> list[str]:
    """What of `learning_rate` and `batch_tokens` doesn't follow the rules of the law's runs; empty: nothing."""
    num_params, num_experts = _rule_arguments(family, hidden_size)
    notes = []
    if (num_params, num_experts) != (_within(num_params, RULE_PARAMS), _within(num_experts, RULE_EXPERTS)):
        low, high = (format_count(end) for end in RULE_PARAMS)
        notes.append(
            f"learning rate clamped: outside the runs of its rule ({low} to {high} parameters without embeddings, up to "
            f"{RULE_EXPERTS[1]:g} experts) the nearest value inside is taken"
        )
    batch = batch_tokens(tokens)
    if batch < SMALLEST_BATCH:
        notes.append(
            f"batch reduced below the {SMALLEST_BATCH // 1024}K tokens of the law's runs, for at least "
            f"{FEWEST_STEPS} steps"
        )
    if tokens < FEWEST_STEPS * batch:
        notes.append(
            f"fewer than {FEWEST_STEPS} steps even with one sequence of {SEQUENCE_LENGTH:,} tokens a batch"
        )
    return notes
