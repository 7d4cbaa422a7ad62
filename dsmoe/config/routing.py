"""Routing policies: which experts a token keeps, as plain dicts that live in config.json.

A policy is one dict per layer. Thresholds are numbers in the config and never buffers of the model, so that
no dtype cast moves them.

| policy          | fields         | a token keeps expert i where                                             |
|-----------------|----------------|--------------------------------------------------------------------------|
| dense           |                | always                                                                   |
| top_k           | k              | p_i is among its k largest                                               |
| threshold       | threshold      | N * p_i > threshold                                                      |
| top_p           | top_p          | i belongs to the smallest set of largest p whose sum reaches top_p       |
| threshold_top_k | threshold, k   | p_i is among its k largest; k is the rounded mean count of the threshold |
|                 |                | rule over calibration text (k null: over the batch at hand, as in the    |
|                 |                | paper; only for sweeps, since it makes tokens depend on each other)      |

N is the number of experts of the layer and p the softmax over all N. Every token keeps at least its best
expert. Source: arXiv 2404.05567, section 3 (threshold, TopK, Threshold-TopK); top_p: arXiv 2403.07652.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe.errors import UserError

Policy = dict[str, Any]

_FIELDS: dict[str, frozenset[str]] = {
    "dense": frozenset(),
    "top_k": frozenset({"k"}),
    "threshold": frozenset({"threshold"}),
    "top_p": frozenset({"top_p"}),
    "threshold_top_k": frozenset({"threshold", "k"}),
}
POLICY_NAMES = tuple(_FIELDS)

DENSE: Policy = {"policy": "dense"}


def check_policy(policy: Mapping[str, Any], num_experts: int, where: str = "policy") -> Policy:
    """Return the policy as a plain dict with every field, after checking it.

    Args:
        policy: the dict to check.
        num_experts: experts of the layer it is for.
        where: what to call it in an error.

    Raises:
        UserError: unknown policy, unknown or missing field, or a value out of range.
    """
    if not isinstance(policy, Mapping):
        raise UserError(
            f"{where}: {policy!r} is not a policy; give a dict such as {{'policy': 'top_k', 'k': 4}}"
        )
    name = policy.get("policy")
    if name not in _FIELDS:
        raise UserError(f"{where}: unknown policy {name!r}; known are {', '.join(POLICY_NAMES)}")
    fields = _FIELDS[name]
    unknown = set(policy) - fields - {"policy"}
    if unknown:
        raise UserError(
            f"{where}: policy {name!r} has no field {sorted(unknown)[0]!r}; it takes {sorted(fields)}"
        )
    if name == "threshold_top_k":
        policy = {"k": None, **policy}
    missing = fields - set(policy)
    if missing:
        raise UserError(f"{where}: policy {name!r} needs {sorted(missing)[0]!r}")
    checked: Policy = {"policy": name}
    if "threshold" in fields:
        checked["threshold"] = _number(
            policy["threshold"], f"{where}: threshold (on N * p)", 0.0, num_experts
        )
    if "top_p" in fields:
        checked["top_p"] = _number(policy["top_p"], f"{where}: top_p", 0.0, 1.0)
    if "k" in fields:
        k = policy["k"]
        if k is None and name == "threshold_top_k":
            checked["k"] = None
        elif isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_experts:
            raise UserError(f"{where}: k is {k!r}; it must be an integer from 1 to {num_experts} experts")
        else:
            checked["k"] = k
    return checked


def _number(value: Any, where: str, low: float, high: float) -> float:
    # the comparison is also false for NaN
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{where} is {value!r}; it must be a number from {low:g} to {high:g}")
    return float(value)


def policies_per_layer(
    value: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    num_layers: int,
    num_experts: int,
    where: str,
) -> list[Policy]:
    """One checked policy per layer, from a single policy (repeated), a list, or None (dense).

    Raises:
        UserError: a list whose length is not `num_layers`, or a bad policy.
    """
    if value is None:
        value = DENSE
    if isinstance(value, Mapping):
        value = [value] * num_layers
    if len(value) != num_layers:
        raise UserError(
            f"{where}: {len(value)} policies for {num_layers} layers; give one per layer, or a single one"
        )
    return [check_policy(policy, num_experts, f"{where}[{layer}]") for layer, policy in enumerate(value)]


def is_dense(policy: Mapping[str, Any], num_experts: int) -> bool:
    """Whether the policy keeps every expert for every token, whatever the router says."""
    return (
        num_experts == 1
        or policy["policy"] == "dense"
        or (policy["policy"] in ("top_k", "threshold_top_k") and policy["k"] == num_experts)
    )
