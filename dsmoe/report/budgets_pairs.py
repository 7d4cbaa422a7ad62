"""What decides between the kinds at each active share: paired differences between the models of a study."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe.spread import spread

Row = Mapping[str, Any]
MOST_ACTIVE = 0.36  # "a third": the largest share of the headline's gap to the dense twin
SAME_SIZE = 0.05  # models whose total parameters differ by at most that share are of equal size: routers cost a little


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The paired differences on the test split that decide between the kinds.

    An arm that stands against others of its kind is chosen by its validation loss, on what all of them were judged at; of
    DS-MoEs the best at each budget. A DS-MoE is compared with models of its total size (within 5%) only. Differences are
    taken seed by seed.

    Args:
        rows: of `dsmoe.report.budgets.measured_rows`.

    Returns:
        "arms": {"dense" (the twin: as many tokens, of the sizes within 5% the closest), "dsmoe": name or None};
        "dsmoe_gap_to_dense": of the largest share up to 0.36; by budget "dsmoe_minus_dense", "dsmoe_minus_smoe" (the SMoE
        of that share with as many tokens) and "dsmoe_minus_smoe_of_more_tokens" (SMoEs that were given more), each
        difference {"arm", "other", "mean", "stderr", "interval", "seeds", "mlp_active_fraction"}; "several_budgets": the
        same five of each DS-MoE that was trained for several budgets, by arm, where there are other DS-MoEs. Parts
        without a pair are missing (None for the gap).
    """
    sparse = [row for row in rows if row["kind"] == "dsmoe" and row["budget"] < 1]
    found = _against_others(rows, sparse)
    trained: dict[str, set[float]] = defaultdict(set)
    for row in sparse:
        if row.get("trained"):
            trained[row["arm"]].add(row["budget"])
    several = [arm for arm, budgets in trained.items() if len(budgets) > 1]
    if several and len({row["arm"] for row in sparse}) > 1:
        found["several_budgets"] = {
            arm: _against_others(rows, [row for row in sparse if row["arm"] == arm]) for arm in several
        }
    return found


def _against_others(rows: Sequence[Row], sparse: Sequence[Row]) -> dict[str, Any]:
    """What `summarise` says of these rows of DS-MoEs."""
    own = {}
    for budget in sorted({row["budget"] for row in sparse}):
        best = best_arm(at_budget(sparse, budget))
        own[budget] = [row for row in at_budget(sparse, budget) if row["arm"] == best]
    third = max((budget for budget in own if budget <= MOST_ACTIVE), default=None)
    ours = own[third] if third is not None else []
    dense = best_arm(dense_twins(rows, ours))
    found: dict[str, Any] = {"arms": {"dense": dense, "dsmoe": ours[0]["arm"] if ours else None}}
    found |= {
        name: {} for name in ("dsmoe_minus_dense", "dsmoe_minus_smoe", "dsmoe_minus_smoe_of_more_tokens")
    }
    for budget, at in own.items():
        smoes = [row for row in rows if row["kind"] == "smoe" and abs(row["budget"] - budget) < 1e-6]
        smoes = [row for row in smoes if size_distance(row, at[0]) <= SAME_SIZE]
        tokens = at[0]["tokens"]
        for name, rivals in (
            ("dsmoe_minus_dense", dense_twins(rows, at)),
            ("dsmoe_minus_smoe", [row for row in smoes if row["tokens"] == tokens]),
            ("dsmoe_minus_smoe_of_more_tokens", [row for row in smoes if row["tokens"] > tokens]),
        ):
            best = best_arm(rivals)
            pair = paired_difference(at, [row for row in rivals if row["arm"] == best])
            if pair:
                found[name][f"{budget:g}"] = pair
    found["dsmoe_gap_to_dense"] = found["dsmoe_minus_dense"].get(f"{third:g}") if third is not None else None
    return found


def size_distance(row: Row, other: Row) -> float:
    """How far apart the total sizes are, as a share of the second."""
    return abs(row["num_params_total"] - other["num_params_total"]) / other["num_params_total"]


def dense_twins(rows: Sequence[Row], own: Sequence[Row]) -> list[Row]:
    """The dense models that a DS-MoE is compared with: of as many tokens, and the closest in size within 5%.

    Without a DS-MoE there is nothing to compare, and all of them are returned.
    """
    dense = [row for row in rows if row["kind"] == "dense"]
    if not own:
        return dense
    near = [
        row for row in dense if row["tokens"] == own[0]["tokens"] and size_distance(row, own[0]) <= SAME_SIZE
    ]
    closest = min((size_distance(row, own[0]) for row in near), default=0.0)
    return [row for row in near if size_distance(row, own[0]) == closest]


def at_budget(rows: Sequence[Row], budget: float) -> list[Row]:
    """The rows that were asked for that share."""
    return [row for row in rows if row["budget"] == budget]


def best_arm(rows: Sequence[Row]) -> str | None:
    """The arm with the lowest mean validation loss over the budgets and seeds that all arms have.

    Where there are none, over those that most have, and arms without any of these stay out.
    """
    places: dict[str, dict[tuple[float, int], float]] = defaultdict(dict)
    for row in rows:
        places[row["arm"]][row["budget"], row["seed"]] = row["validation_loss"]
    shared = Counter(place for losses in places.values() for place in losses)
    most = max(shared.values(), default=0)
    means = {}
    for arm, losses in places.items():
        common = [loss for place, loss in losses.items() if shared[place] == most]
        if common:
            means[arm] = sum(common) / len(common)
    return min(means, key=lambda arm: means[arm], default=None)


def paired_difference(first: Sequence[Row], second: Sequence[Row]) -> dict[str, Any] | None:
    """Test loss of one model less that of another, seed by seed; None where they share no seed.

    Args:
        first: rows of one arm at one share; its share is the one reported.
        second: rows of the other arm, at one share.

    Returns:
        {"arm", "other", "mean", "stderr", "interval" (nats per token; the last two as `spread` has them), "seeds",
        "mlp_active_fraction"}.
    """
    other = {row["seed"]: row["test_loss"] for row in second}
    common = [row for row in first if row["seed"] in other]
    if not common:
        return None
    differences = spread([row["test_loss"] - other[row["seed"]] for row in common])
    active = sum(row["mlp_active_fraction"] for row in common) / len(common)
    return {
        "arm": common[0]["arm"],
        "other": second[0]["arm"],
        **{name: differences[name] for name in ("mean", "stderr", "interval")},
        "seeds": [row["seed"] for row in common],
        "mlp_active_fraction": active,
    }
