"""Schedules at their corners."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.config.run import OptimSettings, RouterLossSettings
from dsmoe.optim import learning_rate_factor, loss_coefficient_factor


def test_cosine():
    chosen = OptimSettings(schedule="cosine", warmup_fraction=0.1, min_lr_ratio=0.1)
    factors = [learning_rate_factor(step, 100, chosen) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


def test_wsd():
    chosen = OptimSettings(schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2, min_lr_ratio=0.0)
    factors = [learning_rate_factor(step, 100, chosen) for step in range(101)]
    assert factors[9:81] == pytest.approx([1.0] * 72)
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05) and factors[100] == 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.sampled_from(["cosine", "wsd"]),
    st.floats(0, 0.5),
    st.floats(0, 0.5),
    st.floats(0.01, 1.0),
)
def test_shares_of_the_peak(total, schedule, warmup, decay, low):
    """A rise, then never a rise again; always in (0, 1]."""
    chosen = OptimSettings(schedule=schedule, warmup_fraction=warmup, decay_fraction=decay, min_lr_ratio=low)
    factors = [learning_rate_factor(step, total, chosen) for step in range(total)]
    assert all(0 < factor <= 1 + 1e-12 for factor in factors)
    after = factors[max(1, round(warmup * total)) - 1 :]
    assert all(second <= first + 1e-12 for first, second in itertools.pairwise(after))


def test_coefficient():
    assert loss_coefficient_factor(0, 100, RouterLossSettings()) == 1.0
    ramp = RouterLossSettings(mi_schedule="ramp", mi_ramp_start=0.2, mi_ramp_end=0.6)
    found = [loss_coefficient_factor(step, 100, ramp) for step in (0, 20, 40, 60, 99)]
    assert found == pytest.approx([0.0, 0.0, 0.5, 1.0, 1.0])
    decay = RouterLossSettings(mi_schedule="decay", mi_ramp_start=0.2, mi_ramp_end=0.6, mi_final_factor=0.1)
    found = [loss_coefficient_factor(step, 100, decay) for step in (0, 20, 40, 60, 99)]
    assert found == pytest.approx([1.0, 1.0, 0.55, 0.1, 0.1])
    assert RouterLossSettings().mi_final_factor == 0.0
