"""Paired comparison of models that answered the same questions.

For questions i = 1..n of a task let d_i = a_i - b_i, the difference of two models' outcomes. The mean of d_i
is the difference of their accuracies; its standard error is sqrt(var(d) / n), with the unbiased variance. It
is smaller than that of two independent samples, since the models find the same questions hard.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmoe.errors import UserError


@dataclass(frozen=True)
class Difference:
    """A difference of two models' scores.

    Args:
        difference: first minus second, as a fraction (0.01 is one point of accuracy).
        stderr: its standard error; infinite for a single question.
    """

    difference: float
    stderr: float

    @property
    def tie(self) -> bool:
        """Whether the difference is within two standard errors."""
        return self.difference == 0 or abs(self.difference) < 2 * self.stderr


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """Mean of values and its standard error, sqrt(var / n); infinite for a single value.

    Raises:
        UserError: no values.
    """
    n = len(values)
    if n == 0:
        raise UserError("no questions to compare")
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, math.sqrt(variance / n)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Difference of two models on one task.

    Args:
        a: the first model's outcome for each question (1 right, 0 wrong).
        b: the second model's, for the same questions in the same order.

    Raises:
        UserError: different numbers of questions, or none.
    """
    if len(a) != len(b):
        raise UserError(
            f"{len(a)} questions cannot be paired with {len(b)}; score both models with the same --limit"
        )
    return Difference(*mean_and_stderr([x - y for x, y in zip(a, b, strict=True)]))


def average(differences: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over tasks of (value, standard error) pairs.

    Tasks are independent samples: SE = sqrt(sum of SE^2) / tasks.

    Raises:
        UserError: no tasks.
    """
    if not differences:
        raise UserError("no tasks to average over")
    count = len(differences)
    mean = math.fsum(value for value, _ in differences) / count
    return mean, math.sqrt(math.fsum(stderr**2 for _, stderr in differences)) / count


def compare(
    a: Mapping[str, Mapping[str, str]], b: Mapping[str, Mapping[str, str]], metric: str = "acc"
) -> dict[str, Difference]:
    """All paired differences of two models.

    Args:
        a: the first model's outcomes, as `harness.score_model` gives them: task to {"ids": digest of the
            questions, "acc": "0110..."}.
        b: the second model's.
        metric: "acc" or "acc_norm".

    Returns:
        Task to difference for the tasks that both models answered, then "average" over these, if any.

    Raises:
        UserError: the questions of a task differ.
    """
    differences = {}
    for task, questions in a.items():
        if task not in b or metric not in questions or metric not in b[task]:
            continue
        if questions["ids"] != b[task]["ids"]:
            raise UserError(
                f"task {task}: the two models answered different questions, so they cannot be paired"
            )
        differences[task] = paired_difference(
            [int(digit) for digit in questions[metric]], [int(digit) for digit in b[task][metric]]
        )
    if differences:
        pairs = [(value.difference, value.stderr) for value in differences.values()]
        differences["average"] = Difference(*average(pairs))
    return differences
