"""Routing policies: which experts a token keeps, as plain dicts that live in config.json.

A policy is one dict per layer. Thresholds are numbers in the config and never buffers of the model, so that
no dtype cast moves them.

| policy          | fields         | a token keeps expert i where                                             |
|-----------------|----------------|--------------------------------------------------------------------------|
| dense           |                | always                                                                   |
| top_k           | k              | s_i is among its k largest                                               |
| threshold       | threshold      | N * s_i > threshold (a number, or a list with one per expert)            |
| top_p           | top_p          | i belongs to the smallest set of largest s whose share reaches top_p     |
| threshold_top_k | threshold, k   | s_i is among its k largest; k is the rounded mean count of the threshold |
|                 |                | rule over calibration text (k null: over the batch at hand, as in the    |
|                 |                | paper; only for sweeps, since it makes tokens depend on each other)      |

N is the number of experts of the layer, p the softmax over all N and s_i = p_i * w_i. The weights w are the optional
field `score_weights` (one positive number per expert; 1 where it is left out), for example the mean norm of each
expert's output. They decide what is kept and never enter the gates. Every token keeps at least its best expert, the
one of the largest s.

Removed experts (`mlp_kept_experts`, `attention_kept_experts` of the config) are never kept: a rule chooses among those
that are stored. N, p and the shares of top_p (s over the sum of all N) stay as they were, so removing an expert that
no token keeps changes nothing; where the stored ones can't reach top_p, all of them are kept.

Source: arXiv 2404.05567, section 3 (threshold, TopK, Threshold-TopK); top_p: arXiv 2403.07652.
"""

import math
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
_OPTIONAL: dict[str, frozenset[str]] = {
    name: frozenset() if name == "dense" else frozenset({"score_weights"}) for name in _FIELDS
}
POLICY_NAMES = tuple(_FIELDS)

DENSE: Policy = {"policy": "dense"}


def check_policy(
    policy: Mapping[str, Any],
    num_experts: int,
    where: str = "policy",
    kept_experts: Sequence[int] | None = None,
) -> Policy:
    """Return the policy as a plain dict with every field, after checking it.

    Args:
        policy: the dict to check.
        num_experts: N, experts of the layer it is for, removed ones included.
        where: what to call it in an error.
        kept_experts: the experts of the layer that are stored; None: all.

    Raises:
        UserError: unknown policy, unknown or missing field, or a value out of range.
    """
    name = _check_fields(policy, where)
    checked: Policy = {"policy": name}
    weights = None
    if "score_weights" in policy:
        weights = _score_weights(policy["score_weights"], num_experts, f"{where}: score_weights")
    if "threshold" in _FIELDS[name]:
        # above N times the largest weight nothing could ever be
        highest = num_experts * max(weights or [1.0])
        checked["threshold"] = _threshold(policy["threshold"], num_experts, highest, where)
    if "top_p" in _FIELDS[name]:
        checked["top_p"] = _number(policy["top_p"], f"{where}: top_p", 0.0, 1.0)
    if "k" in _FIELDS[name]:
        k = policy.get("k")
        may_be_null = name == "threshold_top_k"
        checked["k"] = None if k is None and may_be_null else _k(k, num_experts, where, kept_experts)
    if weights is not None:
        checked["score_weights"] = weights
    return checked


def _check_fields(policy: Any, where: str) -> str:
    """The policy's name, after checking that it is one and has its fields and no others."""
    if not isinstance(policy, Mapping):
        raise UserError(
            f"{where}: {policy!r} is not a policy; give a dict such as {{'policy': 'top_k', 'k': 4}}"
        )
    name = policy.get("policy")
    if not isinstance(name, str) or name not in _FIELDS:
        raise UserError(f"{where}: unknown policy {name!r}; known are {', '.join(POLICY_NAMES)}")
    fields, optional = _FIELDS[name], _OPTIONAL[name]
    unknown = set(policy) - fields - optional - {"policy"}
    if unknown:
        takes = f"it takes {sorted(fields)}" + (f" and may have {sorted(optional)}" if optional else "")
        raise UserError(f"{where}: policy {name!r} has no field {sorted(map(str, unknown))[0]!r}; {takes}")
    missing = fields - set(policy) - ({"k"} if name == "threshold_top_k" else set())
    if missing:
        raise UserError(f"{where}: policy {name!r} needs {sorted(missing)[0]!r}")
    return name


def _k(k: Any, num_experts: int, where: str, kept_experts: Sequence[int] | None) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_experts:
        raise UserError(f"{where}: k is {k!r}; it must be an integer from 1 to {num_experts} experts")
    if kept_experts is not None and k > len(kept_experts):
        raise UserError(
            f"{where}: k is {k}, and {len(kept_experts)} of the layer's {num_experts} experts remain; "
            f"it must be at most {len(kept_experts)}"
        )
    return k


def _threshold(value: Any, num_experts: int, highest: float, where: str) -> float | list[float]:
    what = f"{where}: threshold (on N * p)"
    if not isinstance(value, list | tuple):
        return _number(value, what, 0.0, highest)
    if len(value) != num_experts:
        raise UserError(
            f"{what} has {len(value)} numbers; give one, or one for each of {num_experts} experts"
        )
    return [_number(one, f"{what} of expert {expert}", 0.0, highest) for expert, one in enumerate(value)]


def _score_weights(value: Any, num_experts: int, where: str) -> list[float]:
    if not isinstance(value, list | tuple) or len(value) != num_experts:
        found = f"{len(value)} numbers" if isinstance(value, list | tuple) else repr(value)
        raise UserError(f"{where}: {found}; give a list with one for each of {num_experts} experts")
    for expert, one in enumerate(value):
        number = not isinstance(one, bool) and isinstance(one, int | float)
        if not (number and one > 0 and math.isfinite(one)):
            raise UserError(f"{where} of expert {expert} is {one!r}; it must be a finite number above 0")
    return [float(one) for one in value]


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
    kept_experts: Sequence[Sequence[int]] | None = None,
) -> list[Policy]:
    """One checked policy per layer, from a single policy (repeated), a list, or None (dense).

    Args:
        value: as above.
        num_layers: layers of the model.
        num_experts: N, experts of a layer, removed ones included.
        where: what to call it in an error.
        kept_experts: the experts that are stored, one list per layer; None: all.

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
    return [
        check_policy(policy, num_experts, f"{where}[{layer}]", kept_experts[layer] if kept_experts else None)
        for layer, policy in enumerate(value)
    ]


def is_dense(policy: Mapping[str, Any], num_experts: int) -> bool:
    """Whether the policy keeps every expert that is stored for every token, whatever the router says.

    Args:
        policy: a checked policy.
        num_experts: experts of the layer that are stored.
    """
    return (
        num_experts == 1
        or policy["policy"] == "dense"
        or (policy["policy"] in ("top_k", "threshold_top_k") and policy["k"] == num_experts)
    )
