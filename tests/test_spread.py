"""Means over seeds, their intervals, and what is called a tie."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dsmoe.spread import interval_cells, is_tie, shown, spread


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6).filter(lambda values: np.std(values) > 1e-6))
def test_the_interval_is_that_of_students_t(values):
    found = spread(values)
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert found["interval"] == pytest.approx(list(expected))
    # the same verdict as the paired t test of that level
    assert is_tie(found) == (stats.ttest_1samp(values, 0).pvalue >= 0.05)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_no_difference_is_called_one_in_a_twentieth_of_cases(seeds):
    generator = np.random.default_rng(seeds)
    called = [not is_tie(spread(values)) for values in generator.normal(0, 0.01, (2000, seeds)).tolist()]
    assert np.mean(called) == pytest.approx(0.05, abs=0.015)


def test_one_seed_has_no_spread_and_decides_nothing():
    found = spread([0.25])
    assert found == {"mean": 0.25, "std": None, "stderr": None, "interval": None}
    assert is_tie(found) is None
    assert interval_cells(found) == ["", ""] and shown(found, sign=True) == "+0.2500"


def test_in_a_table():
    found = spread([0.1, 0.11, 0.12])
    assert shown(found) == "0.1100 \u00b1 0.0058"
    assert interval_cells(found) == ["+0.085 to +0.135", ""]
    assert interval_cells(spread([-0.1, 0.1])) == ["-1.271 to +1.271", "tie"]
    assert interval_cells(None) == ["", ""] and shown(None) == ""
