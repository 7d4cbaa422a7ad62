"""Exact allocation of a budget over sites: the multiple-choice knapsack problem by dynamic programming.

Each site takes one of its levels; costs and damages add up. One pass gives the least damage for every budget.
"""

from collections.abc import Sequence

import numpy as np


class Knapsack:
    """The best choice of levels for every integer budget.

    Args:
        costs: per site the cost of each level, integers >= 0.
        damages: per site the damage of each level.
        max_budget: the largest budget of interest; None: the sum of all largest costs.
    """

    def __init__(
        self,
        costs: Sequence[Sequence[int]],
        damages: Sequence[Sequence[float]],
        max_budget: int | None = None,
    ) -> None:
        self.costs = [np.asarray(row, dtype=np.int64) for row in costs]
        size = sum(int(row.max()) for row in self.costs) if max_budget is None else max_budget
        least = np.full(size + 1, np.inf)
        least[0] = 0.0
        self._choices = []
        for cost, damage in zip(self.costs, damages):
            best = np.full(size + 1, np.inf)
            choice = np.zeros(size + 1, dtype=np.int32)
            for level, (price, harm) in enumerate(zip(cost.tolist(), damage)):
                if price > size:
                    continue
                candidate = np.full(size + 1, np.inf)
                candidate[price:] = least[: size + 1 - price] + harm
                better = candidate < best
                best[better] = candidate[better]
                choice[better] = level
            least = best
            self._choices.append(choice)
        # exact spendings so far; a budget may also be left unspent
        self._exact = least
        places = np.arange(size + 1)
        lower = np.concatenate([[True], least[1:] < np.minimum.accumulate(least)[:-1]])
        self._spent = np.maximum.accumulate(np.where(lower, places, 0))

    @property
    def size(self) -> int:
        """The largest budget."""
        return len(self._exact) - 1

    def damage(self, budget: int) -> float:
        """The least sum of damages at a cost of at most `budget`; infinite where nothing is so cheap."""
        return float(self._exact[self._spent[min(budget, len(self._exact) - 1)]])

    def levels(self, budget: int) -> list[int]:
        """The level of every site that gives it.

        Raises:
            ValueError: nothing is so cheap.
        """
        at = int(self._spent[min(budget, len(self._exact) - 1)])
        if not np.isfinite(self._exact[at]):
            raise ValueError(f"no choice of levels costs at most {budget}")
        found = []
        for cost, choice in zip(reversed(self.costs), reversed(self._choices)):
            level = int(choice[at])
            found.append(level)
            at -= int(cost[level])
        return found[::-1]
