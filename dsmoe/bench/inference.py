"""The cases of the inference benchmark: expert layers, decoding and prefill."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsmoe.bench.ceiling import gemm_flops_per_second, read_bytes_per_second
from dsmoe.bench.inference_contestants import (
    DTYPES,
    IMPLEMENTATIONS,
    Batch,
    LayerWeights,
    batches,
    layer_steps,
    layer_weights,
)
from dsmoe.bench.inference_model import FULL_MODEL, QUICK_MODEL, ModelCase
from dsmoe.bench.timing import interleaved_seconds, ratio
from dsmoe.bench.training import case_name

# implementations that copy weights for every pair are left out above so many bytes
_LARGEST_COPY_BYTES = 2 << 30
_READ_ROUNDS = 3


@dataclass(frozen=True)
class InferencePlan:
    """What a run measures.

    Attributes:
        decode_rounds: timed rounds of each case of decoding.
        decode_layers: calls of a contestant in a row in decoding, each with other weights: a token's way through
            so many layers.
        prefill_rounds: timed rounds of each case of prefill.
        layers: (hidden size, experts, hidden units of one expert).
        kept: experts that a token keeps.
        batches: tokens of a decoding step.
        prefill_tokens: tokens of a prefill.
        cold_bytes: weights that calls rotate over in decoding; several times the largest cache.
        model: the whole model.
    """

    decode_rounds: int
    decode_layers: int
    prefill_rounds: int
    layers: tuple[tuple[int, int, int], ...]
    kept: tuple[int, ...]
    batches: tuple[int, ...]
    prefill_tokens: int
    cold_bytes: int
    model: ModelCase


FULL = InferencePlan(
    decode_rounds=30,
    decode_layers=8,
    prefill_rounds=15,
    layers=((512, 32, 64), (1024, 32, 128)),
    kept=(4, 8),
    batches=(1, 8),
    prefill_tokens=1024,
    cold_bytes=600 << 20,
    model=FULL_MODEL,
)
QUICK = InferencePlan(
    decode_rounds=3,
    decode_layers=2,
    prefill_rounds=2,
    layers=((32, 8, 8),),
    kept=(2,),
    batches=(1, 8),
    prefill_tokens=64,
    cold_bytes=1 << 16,
    model=QUICK_MODEL,
)


@dataclass(frozen=True)
class Case:
    """One case of a layer.

    Attributes:
        phase: "decode" or "prefill".
        tokens: T.
        k: experts that a token keeps (threshold: in the mean).
        rounds: timed rounds.
        layers: calls in a row.
    """

    phase: str
    tokens: int
    k: int
    rounds: int
    layers: int


def cases(plan: InferencePlan, phases: Sequence[str]) -> list[Case]:
    """The cases of every layer and dtype."""
    decode = [
        Case("decode", tokens, k, plan.decode_rounds, plan.decode_layers)
        for tokens in plan.batches
        for k in plan.kept
    ]
    prefill = [Case("prefill", plan.prefill_tokens, k, plan.prefill_rounds, 1) for k in plan.kept]
    return [case for case in decode + prefill if case.phase in phases]


@torch.inference_mode()
def measure_layer(
    sizes: tuple[int, int, int],
    dtype_name: str,
    plan: InferencePlan,
    phases: Sequence[str],
    advance: Callable[[], Any],
) -> list[dict[str, Any]]:
    """The rows of one layer in one dtype.

    Args:
        sizes: hidden size, experts, hidden units of one expert.
        dtype_name: key of DTYPES.
        plan: rounds, tokens, kept experts.
        phases: of "decode", "prefill".
        advance: called after each timed step.
    """
    dtype = DTYPES[dtype_name]
    weights = layer_weights(sizes, dtype, plan.cold_bytes, dtype_name == "int8")
    ceilings: dict[str, float] = {}
    if "decode" in phases:
        ceilings["read"] = read_bytes_per_second(plan.cold_bytes, _READ_ROUNDS)
    if "prefill" in phases:
        hidden_size, num_experts, width = sizes
        ceilings["gemm"] = gemm_flops_per_second(
            plan.prefill_tokens, hidden_size, num_experts * width, dtype, plan.prefill_rounds, ("forward", "input")
        )  # fmt: skip
    rows = []
    for case in cases(plan, phases):
        rows += [{"dtype": dtype_name, **row} for row in _measure_case(weights, case, ceilings, advance)]
    return rows


def _measure_case(
    weights: LayerWeights, case: Case, ceilings: Mapping[str, float], advance: Callable[[], Any]
) -> list[dict[str, Any]]:
    # as many batches as calls where they are small: every contestant meets the same ones
    calls = (case.rounds + 1) * case.layers
    given = batches(weights, case.tokens, case.k, calls if case.phase == "decode" else 2)
    peers, notes = _peers_that_run(weights, given[0])
    seconds = interleaved_seconds(
        layer_steps(weights, given, peers), case.rounds, advance=advance, shuffle=True, in_a_row=case.layers
    )
    best = min(peers, key=lambda name: statistics.median(seconds[name]), default=None)
    common = {
        "case": f"{case_name(weights.sizes)} K{case.k}",
        "phase": case.phase,
        "batch": case.tokens if case.phase == "decode" else 1,
        "tokens": case.tokens,
        "num_experts": weights.sizes[1],
        "k": case.k,
        "best_transformers_implementation": best,
        "transformers_notes": notes,
        "seconds": seconds,
        "read_bytes_per_second": ceilings.get("read"),
        "gemm_flops_per_second": ceilings.get("gemm"),
    }
    rows = []
    for policy in ("top_k", "threshold"):
        rows.append({**common, "policy": policy, **_policy_row(weights, case, policy, given, seconds, best)})
        rows[-1].update(_shares(weights, case, rows[-1], ceilings))
    return rows


def _peers_that_run(weights: LayerWeights, batch: Batch) -> tuple[list[str], dict[str, str]]:
    """transformers' implementations that can run this case, and why the others don't."""
    up, down = weights.own[0][:2]
    copied = batch.index.numel() * (up.numel() + down.numel()) * weights.dtype.itemsize // up.shape[0]
    peers, notes = [], {}
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and copied > _LARGEST_COPY_BYTES:
            notes[name] = f"not run: it copies weights for every pair, {copied / 2**30:.0f} GiB here"
            continue
        try:
            weights.stock[name][0](batch.x[:8], batch.index[:8], batch.weights[:8])
        except RuntimeError as error:
            notes[name] = f"does not run: {str(error).splitlines()[0][:120]}"
            continue
        peers.append(name)
    return peers, notes


def _policy_row(
    weights: LayerWeights,
    case: Case,
    policy: str,
    given: Sequence[Batch],
    seconds: Mapping[str, list[float]],
    best: str | None,
) -> dict[str, Any]:
    up, down = weights.own[0][:2]
    num_experts = up.shape[0]
    masks = [getattr(batch, policy) for batch in given]
    mean_kept = statistics.fmean(float(mask.sum(-1).double().mean()) for mask in masks)
    distinct = statistics.fmean(float(mask.any(0).sum()) for mask in masks)
    to_all = ratio(seconds[policy], seconds["all_experts"])
    return {
        "mean_kept_experts": mean_kept,
        "mean_distinct_experts": distinct,
        "active_bytes": round(distinct / num_experts * (up.nbytes + down.nbytes)),
        # decoding is bound by the reading of weights, prefill by arithmetic
        "ideal_ratio": (distinct if case.phase == "decode" else mean_kept) / num_experts,
        "time_ratio_to_all_experts": to_all["median"],
        "time_ratio_to_all_experts_quartiles": [to_all["low"], to_all["high"]],
        "time_ratio_to_dense": ratio(seconds[policy], seconds["dense"])["median"],
        "time_ratio_to_top_k": _ratio_at_equal_work(case, policy, given, seconds),
        "time_ratio_to_reading": ratio(seconds[policy], seconds["reading"])["median"]
        if policy == "top_k" and "reading" in seconds
        else None,
        "speedup_over_transformers": ratio(seconds[best], seconds[policy])["median"] if best else None,
    }


def _ratio_at_equal_work(
    case: Case, policy: str, given: Sequence[Batch], seconds: Mapping[str, list[float]]
) -> float:
    """Time per unit of work against top-K's: rounds of a threshold differ in how many experts are kept."""

    def per_unit(name: str) -> list[float]:
        masks = [getattr(batch, name) for batch in given]
        work = [int(mask.any(0).sum() if case.phase == "decode" else mask.sum()) for mask in masks]
        # the first turn was a round that isn't counted
        turns = ((number + 1) * case.layers for number in range(len(seconds[name])))
        done = [sum(work[(first + call) % len(work)] for call in range(case.layers)) for first in turns]
        return [case.layers * value / units for value, units in zip(seconds[name], done)]

    return ratio(per_unit(policy), per_unit("top_k"))["median"]


def _shares(
    weights: LayerWeights, case: Case, row: Mapping[str, Any], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """How near the ceilings the policy and the all-experts path come."""
    hidden_size, num_experts, width = weights.sizes
    up, down = weights.own[0][:2]
    ours = statistics.median(row["seconds"][row["policy"]])
    all_experts = statistics.median(row["seconds"]["all_experts"])
    if case.phase == "decode":
        rate = ceilings["read"]
        return {
            "share_of_read_bandwidth": row["active_bytes"] / ours / rate,
            "all_experts_share_of_read_bandwidth": (up.nbytes + down.nbytes) / all_experts / rate,
        }
    flops = 6 * case.tokens * hidden_size * width
    return {
        "share_of_gemm_ceiling": flops * row["mean_kept_experts"] / ours / ceilings["gemm"],
        "all_experts_share_of_gemm_ceiling": flops * num_experts / all_experts / ceilings["gemm"],
    }
