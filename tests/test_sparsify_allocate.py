"""The knapsack against brute force."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe.sparsify.allocate import Knapsack

SITES = st.lists(
    st.lists(st.tuples(st.integers(0, 12), st.floats(-1, 5, allow_nan=False)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


@given(SITES, st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_least_damage_of_every_budget(sites, budget):
    costs = [[price for price, _ in site] for site in sites]
    damages = [[harm for _, harm in site] for site in sites]
    knapsack = Knapsack(costs, damages)
    within = [
        sum(harm for _, harm in choice)
        for choice in product(*sites)
        if sum(price for price, _ in choice) <= budget
    ]
    if not within:
        assert knapsack.damage(budget) == float("inf")
        with pytest.raises(ValueError, match=str(budget)):
            knapsack.levels(budget)
        return
    levels = knapsack.levels(budget)
    assert sum(cost[level] for cost, level in zip(costs, levels)) <= budget
    damage = sum(row[level] for row, level in zip(damages, levels))
    assert damage == pytest.approx(min(within), abs=1e-9)
    assert knapsack.damage(budget) == pytest.approx(min(within), abs=1e-9)


def test_a_smaller_table_gives_the_same():
    costs, damages = [[1, 4, 9], [2, 3, 8]], [[5.0, 2.0, 0.0], [4.0, 3.0, 0.0]]
    whole, small = Knapsack(costs, damages), Knapsack(costs, damages, max_budget=10)
    for budget in range(11):
        assert small.damage(budget) == whole.damage(budget)
