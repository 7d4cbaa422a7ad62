"""From what the user asks for to one routing policy per layer; some need calibration text."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dsmoe.config.routing import Policy, policies_per_layer
from dsmoe.data.loader import largest_remainder
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, set_routing, use_routing
from dsmoe.sparsify.families import MET, rounded
from dsmoe.sparsify.measure import LOWEST, ActiveExperts

Measure = Callable[[], ActiveExperts]

TRIES = 12  # thresholds that are measured for a share
ENOUGH = 0.003  # as near to the share as the search goes
ROUNDS = 3  # of both parts, where each has a target: sparse attention shifts the routing of the MLP

# policy -> what may be asked of it; the k of threshold_top_k is fixed on text, its threshold may be
TAKES: dict[str, tuple[str, ...]] = {
    "dense": (),
    "top_k": ("k",),
    "threshold": ("threshold", "target_active"),
    "top_p": ("top_p",),
    "threshold_top_k": ("threshold", "target_active"),
}


@dataclass
class PolicyRequest:
    """One part's policy as asked for.

    Args:
        name: a policy name, see `dsmoe.config.routing`.
        k: experts per token; one for all layers or one per layer.
        threshold: on N * p; one or one per layer.
        top_p: probability mass.
        target_active: instead of `threshold`: the mean share of active experts that one global threshold shall
            give on calibration text.
    """

    name: str
    k: list[int] | None = None
    threshold: list[float] | None = None
    top_p: float | None = None
    target_active: float | None = None


def resolve_all(
    model: DSMoEForCausalLM, requests: Mapping[str, PolicyRequest], measure: Measure | None
) -> ActiveExperts | None:
    """Set the policies of both parts.

    Args:
        model: densely trained; its policies are set.
        requests: {"mlp": ..., "attention": ...}.
        measure: see `resolve`.

    Returns:
        Active experts under them; None without text.

    Raises:
        UserError: as `resolve`, or shares of active experts that aren't the target's once both parts are sparse.
    """
    # a rounded K has a share of its own
    targets = {
        part: one.target_active
        for part, one in requests.items()
        if one.name == "threshold" and one.target_active is not None
    }
    for _ in range(ROUNDS):
        for part, request in requests.items():
            set_routing(model, part, resolve(model, part, request, measure))
        if measure is None:
            return None
        active = measure()
        if all(abs(active.share(part) - target) <= MET for part, target in targets.items()):
            break
    for part, target in targets.items():
        check_target(part, target, active.share(part))
    return active


def resolve(
    model: DSMoEForCausalLM, part: str, request: PolicyRequest, measure: Measure | None
) -> list[Policy]:
    """One policy per layer.

    Args:
        model: densely trained.
        part: "mlp" or "attention".
        request: what is asked for.
        measure: measures the model, with the policies that its config has at the call, on calibration text; None
            where there is no text.

    Returns:
        Checked policies, one per layer.

    Raises:
        UserError: an impossible request, or one that needs text where there is none.
    """
    config = model.config
    num_experts = config.num_experts if part == "mlp" else config.num_attention_experts
    layers = config.num_hidden_layers
    if num_experts == 1:
        if request.name != "dense":
            raise UserError(
                f"the model has no {part} experts, so policy {request.name!r} has nothing to choose"
            )
        return policies_per_layer(None, layers, num_experts, part)
    thresholds = request.threshold
    if request.target_active is not None:
        if "target_active" not in TAKES[request.name]:
            raise UserError(f"--target-active sets a threshold; policy {request.name!r} has none")
        thresholds = [
            _threshold_for(
                model, part, request.target_active, num_experts, _needed(measure, "--target-active")
            )
        ]
    policies: list[Policy] = []
    for layer in range(layers):
        policy: Policy = {"policy": request.name}
        if request.name in ("threshold", "threshold_top_k"):
            policy["threshold"] = _of_layer(thresholds, layer, layers, "--threshold", request.name)
        if request.name == "top_k":
            policy["k"] = _of_layer(request.k, layer, layers, "--k", request.name)
        if request.name == "top_p":
            policy["top_p"] = _of_layer(None if request.top_p is None else [request.top_p], layer, layers, "--top-p",
                                        request.name)  # fmt: skip
        policies.append(policy)
    policies = policies_per_layer(policies, layers, num_experts, f"{part} policy")
    if request.name == "threshold_top_k":
        target = request.target_active
        total = None if target is None else round(target * num_experts * layers)
        _fix_k(model, part, policies, _needed(measure, "policy threshold_top_k"), total)
    return policies


def _of_layer(values: Sequence[Any] | None, layer: int, layers: int, option: str, policy: str) -> Any:
    if not values:
        raise UserError(f"policy {policy!r} needs {option}")
    if len(values) not in (1, layers):
        raise UserError(
            f"{option} has {len(values)} values; give one, or one for each of the {layers} layers"
        )
    return values[layer if len(values) == layers else 0]


def _needed(measure: Measure | None, what: str) -> Measure:
    if measure is None:
        raise UserError(f"{what} is fixed on calibration text: pass --text FILE or --data TOKEN_FOLDER")
    return measure


def _fix_k(
    model: DSMoEForCausalLM, part: str, policies: list[Policy], measure: Measure, total: int | None
) -> None:
    """K of a layer is the rounded mean count of the threshold rule over calibration text (never a batch's own).

    Args:
        model: as in `resolve`.
        part: as in `resolve`.
        policies: of the layers; each is given its k.
        measure: as in `resolve`.
        total: sum of the layers' K, in which roundings make up for each other; None: each layer's is rounded by itself.
    """
    plain = [{"policy": "threshold", "threshold": policy["threshold"]} for policy in policies]
    with _policies(model, part, plain):
        means = measure().mean(part)
    counts = map(round, means) if total is None else largest_remainder(means, total)
    for policy, count in zip(policies, counts):
        policy["k"] = min(
            max(1, count), model.config.num_experts if part == "mlp" else model.config.num_attention_experts
        )


def _threshold_for(
    model: DSMoEForCausalLM, part: str, target: float, num_experts: int, measure: Measure
) -> float:
    """The global threshold whose mean active share is nearest to the target; raises UserError where none is near.

    Later layers see inputs that depend on what earlier layers drop, so the quantile is taken anew under each guess.
    """
    if not 1 / num_experts <= target <= 1:
        raise UserError(f"--target-active {target}: must be from 1/{num_experts} (one expert) to 1")
    layers = model.config.num_hidden_layers
    tried: dict[float, float] = {}
    low, high = 0.0, math.inf  # thresholds that keep too many, and too few
    guess, quantile = 0.0, target
    for _ in range(TRIES):
        with _policies(model, part, [{"policy": "threshold", "threshold": guess}] * layers):
            active = measure()
        share = tried[guess] = active.share(part)
        if abs(share - target) < ENOUGH:
            break
        low, high = (guess, high) if share > target else (low, guess)
        if guess:
            # every token keeps at least one expert, which a quantile doesn't know
            quantile = min(1.0, max(0.0, quantile + (target - share)))
        # a bin's edge may lie above N, where no policy's threshold may
        guess = rounded(min(active.threshold_for(part, quantile), float(num_experts)))
        if low < high and not low < guess < high:
            guess = rounded(math.sqrt(max(low, 2.0**LOWEST) * min(high, num_experts)))
        if guess in tried:
            break
    best = min(tried, key=lambda threshold: abs(tried[threshold] - target))
    check_target(part, target, tried[best])
    return best


def check_target(part: str, target: float, share: float) -> None:
    """Refuse a share of active experts that is not what was asked for; raises UserError.

    Args:
        part: "mlp" or "attention".
        target: as asked for.
        share: as measured.
    """
    if abs(share - target) > MET:
        option = "--policy top_k --k" if part == "mlp" else "--attention-policy top_k --attention-k"
        raise UserError(
            f"--target-active {target:g}: the nearest share of {part} experts that one threshold gives on this text is "
            f"{share:.4g}; ask for a share near it, or for a number of experts by {option}"
        )


def _policies(model: DSMoEForCausalLM, part: str, policies: list[Policy]) -> AbstractContextManager[None]:
    return use_routing(model, **{part: policies})
