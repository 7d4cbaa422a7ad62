"""Paired comparison: against the definitions, and against a simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe.errors import UserError
from dsmoe.evaluation.comparison import Difference, average, compare, mean_and_stderr, paired_difference

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=60)


@given(BITS)
def test_paired_difference_is_its_definition(pairs):
    a, b = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))
    found = paired_difference(a.tolist(), b.tolist())
    assert found.difference == pytest.approx(a.mean() - b.mean(), abs=1e-12)
    assert found.stderr == pytest.approx(math.sqrt(np.var(a - b, ddof=1) / len(a)), abs=1e-12)
    swapped = paired_difference(b.tolist(), a.tolist())
    assert swapped.difference == pytest.approx(-found.difference, abs=1e-12)
    assert swapped.tie == found.tie


def test_hand_made():
    found = paired_difference([1, 1, 1, 0], [0, 1, 0, 0])
    # differences 1 0 1 0: mean 1/2, variance 1/3, SE sqrt(1/12)
    assert found.difference == 0.5
    assert found.stderr == pytest.approx(math.sqrt(1 / 12))
    assert found.tie


@pytest.mark.parametrize(
    ("difference", "stderr", "tie"),
    [(0.0, 0.0, True), (0.1, 0.0, False), (0.2, 0.1, False), (-0.19, 0.1, True), (-0.21, 0.1, False)],
)
def test_tie(difference, stderr, tie):
    assert Difference(difference, stderr).tie is tie


def test_one_question_is_a_tie():
    found = paired_difference([1], [0])
    assert found.difference == 1 and found.stderr == math.inf and found.tie


def test_stderr_of_the_average_matches_a_simulation():
    generator = np.random.default_rng(0)
    sizes, rates = (40, 90, 25), (0.3, 0.5, 0.8)
    means, predicted = [], []
    for _ in range(2000):
        tasks = [
            mean_and_stderr((generator.random(n) < p).tolist()) for n, p in zip(sizes, rates, strict=True)
        ]
        mean, stderr = average(tasks)
        means.append(mean)
        predicted.append(stderr)
    assert np.mean(means) == pytest.approx(np.mean(rates), abs=0.005)
    assert np.sqrt(np.mean(np.square(predicted))) == pytest.approx(np.std(means), rel=0.05)


def test_compare_pairs_common_tasks_and_averages():
    a = {
        "piqa": {"ids": "x", "acc": "1100"},
        "sciq": {"ids": "y", "acc": "10"},
        "boolq": {"ids": "z", "acc": "1"},
    }
    b = {"piqa": {"ids": "x", "acc": "1000"}, "sciq": {"ids": "y", "acc": "01"}}
    found = compare(a, b)
    assert set(found) == {"piqa", "sciq", "average"}
    assert found["piqa"] == paired_difference([1, 1, 0, 0], [1, 0, 0, 0])
    assert found["average"].difference == pytest.approx(0.125)
    expected = math.hypot(found["piqa"].stderr, found["sciq"].stderr) / 2
    assert found["average"].stderr == pytest.approx(expected)
    assert compare(a, {}) == {}
    assert compare(a, b, "acc_norm") == {}


def test_errors():
    with pytest.raises(UserError, match="4 questions cannot be paired with 3"):
        paired_difference([1, 0, 1, 1], [1, 0, 1])
    with pytest.raises(UserError, match="different questions"):
        compare({"piqa": {"ids": "x", "acc": "1"}}, {"piqa": {"ids": "y", "acc": "1"}})
    with pytest.raises(UserError, match="no questions"):
        mean_and_stderr([])
    with pytest.raises(UserError, match="no tasks"):
        average([])
