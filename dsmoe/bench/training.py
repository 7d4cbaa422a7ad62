"""The cases of the training benchmark: layers, attention, whole models, growth."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsmoe.bench.ceiling import gemm_flops_per_second
from dsmoe.bench.contestants import DTYPES, LayerStep, attention_steps, layer_steps, model_steps
from dsmoe.bench.memory import peak_bytes, saved_bytes
from dsmoe.bench.timing import interleaved_seconds, ratio

# transformers' implementations that copy weights per (token, expert) pair are left out above this many bytes
_LARGEST_COPY_BYTES = 2 << 30
# ... and the others of that kind take 5 to 14 times as long as a dense layer: one round shows that they aren't the best
_SLOW_ROUNDS = 1
_TRIAL_TOKENS = 16


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes:
        rounds: timed rounds of each case.
        tokens: tokens of a layer case.
        layers: (hidden size, experts, hidden units of one expert) of the layer cases.
        model: fields of DSMoEConfig of the whole-model case; num_experts is the DS-MoE's.
        batch: rows and tokens of a row, of attention and whole-model cases.
        growth_rounds: timed rounds of each point of the growth curves.
        growth: what grows to its values.
    """

    rounds: int
    tokens: int
    layers: tuple[tuple[int, int, int], ...]
    model: Mapping[str, Any]
    batch: tuple[int, int]
    growth_rounds: int
    growth: Mapping[str, Sequence[int]]


# 37.7M parameters
MODEL = {
    "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_experts": 32,
    "num_attention_heads": 8, "max_position_embeddings": 512,
}  # fmt: skip
FULL = Plan(
    rounds=15,
    tokens=2048,
    layers=((512, 32, 64), (512, 8, 256), (1024, 32, 128)),
    model=MODEL,
    batch=(2, 512),
    growth_rounds=5,
    growth={
        "experts": (1, 2, 4, 8, 16, 32, 64), "width": (512, 1024, 2048, 4096), "layers": (1, 2, 4),
        "sequence": (128, 256, 512, 1024),
    },
)  # fmt: skip
QUICK = Plan(
    rounds=2,
    tokens=64,
    layers=((32, 4, 8), (32, 32, 8)),
    model={
        **MODEL, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_experts": 4,
    },
    batch=(2, 16),
    growth_rounds=1,
    growth={"experts": (1, 4), "width": (32, 64), "layers": (1, 2), "sequence": (16, 32)},
)  # fmt: skip


def case_name(sizes: tuple[int, int, int]) -> str:
    """ "d512 N32 F64"."""
    return "d{} N{} F{}".format(*sizes)


def measure_layer(
    sizes: tuple[int, int, int], dtype_name: str, plan: Plan, peers: bool, advance: Callable[[], Any]
) -> list[dict[str, Any]]:
    """The rows of one layer case: plain and with recompute.

    Args:
        sizes: hidden size, experts, hidden units of one expert.
        dtype_name: key of DTYPES.
        plan: rounds and tokens.
        peers: time transformers' implementations too (only at 32 experts).
        advance: called after each timed step.

    Returns:
        Rows of "layers".
    """
    hidden_size, num_experts, width = sizes
    names: tuple[str, ...] = ("eager", "batched_mm", "grouped_mm") if peers and num_experts == 32 else ()
    copied = plan.tokens * num_experts * 3 * width * hidden_size * 4
    notes = {}
    if "batched_mm" in names and copied > _LARGEST_COPY_BYTES:
        names = tuple(name for name in names if name != "batched_mm")
        notes["batched_mm"] = f"not run: it copies weights for every pair, {copied / 2**30:.0f} GiB here"
    for name, step in layer_steps(sizes, _TRIAL_TOKENS, DTYPES[dtype_name], names).items():
        try:
            step()
        except RuntimeError as error:
            if name not in names:
                raise
            notes[name] = f"does not run: {str(error).splitlines()[0][:120]}"
            names = tuple(other for other in names if other != name)
    steps = layer_steps(sizes, plan.tokens, DTYPES[dtype_name], names)
    slow = {name: min(_SLOW_ROUNDS, plan.rounds) for name in steps if name.endswith("_mm")}
    seconds = interleaved_seconds(steps, plan.rounds, slow, advance)
    saved = {name: saved_bytes(step.forward, step.parameters()) for name, step in steps.items()}
    peak = {name: peak_bytes(step) for name, step in steps.items() if name in ("dense", "wide", "recompute")}
    rate = gemm_flops_per_second(
        plan.tokens, hidden_size, num_experts * width, DTYPES[dtype_name], plan.rounds
    )
    rows = []
    for name in ("wide", "recompute"):
        flops = (22 if name == "recompute" else 18) * plan.tokens * hidden_size * num_experts * width
        median = statistics.median(seconds[name])
        rows.append(
            {
                "case": case_name(sizes),
                "num_experts": num_experts,
                "dtype": dtype_name,
                "recompute": name == "recompute",
                **_against_dense(name, seconds, saved, peak),
                **_against_peers(name, names, seconds, saved),
                "transformers_notes": notes,
                "tokens_per_second": plan.tokens / median,
                "share_of_gemm_ceiling": flops / median / rate,
            }
        )
    return rows


def _against_dense(
    name: str, seconds: Mapping[str, list[float]], saved: Mapping[str, int], peak: Mapping[str, int | None]
) -> dict[str, Any]:
    to_dense = ratio(seconds[name], seconds["dense"])
    return {
        "time_ratio_to_dense": to_dense["median"],
        "time_ratio_to_dense_quartiles": [to_dense["low"], to_dense["high"]],
        "saved_ratio_to_dense": saved[name] / saved["dense"],
        "seconds": seconds[name],
        "seconds_dense": seconds["dense"],
        "saved_bytes": saved[name],
        "saved_bytes_dense": saved["dense"],
        "peak_bytes": peak[name],
        "peak_bytes_dense": peak["dense"],
    }


def _against_peers(
    name: str, peers: Sequence[str], seconds: Mapping[str, list[float]], saved: Mapping[str, int]
) -> dict[str, Any]:
    """Against the fastest peer; the bytes also against the peer that saves least."""
    speedups = {
        peer: {
            **ratio(seconds[peer], seconds[name]),
            "rounds": len(seconds[peer]),
            "saved_bytes": saved[peer],
        }
        for peer in peers
    }
    best = min(peers, key=lambda peer: speedups[peer]["median"], default=None)
    return {
        "speedup_over_transformers": speedups[best]["median"] if best else None,
        "saved_ratio_to_transformers": saved[name] / saved[best] if best else None,
        "saved_ratio_to_least_saving_transformers": saved[name] / min(saved[peer] for peer in peers)
        if best
        else None,
        "best_transformers_implementation": best,
        "transformers": speedups,
    }


def measure_attention(dtype_name: str, plan: Plan, advance: Callable[[], Any]) -> dict[str, Any]:
    """Mixture of attention heads against the same heads without gates (GQA with one KV head)."""
    heads = plan.model["num_attention_heads"]
    steps = attention_steps(plan.model["hidden_size"], heads, plan.batch, DTYPES[dtype_name])
    seconds = interleaved_seconds(steps, plan.rounds, advance=advance)
    to_gqa = ratio(seconds["moa"], seconds["gqa"])
    return {
        "dtype": dtype_name,
        "heads": heads,
        "time_ratio_to_gqa": to_gqa["median"],
        "time_ratio_to_gqa_quartiles": [to_gqa["low"], to_gqa["high"]],
        "saved_ratio_to_gqa": _saved(steps["moa"]) / _saved(steps["gqa"]),
        "seconds": seconds,
    }


def _saved(step: LayerStep) -> int:
    return saved_bytes(step.forward, step.parameters())


def measure_model(dtype_name: str, plan: Plan, advance: Callable[[], Any]) -> dict[str, Any]:
    """DS-MoE against its dense twin: tokens a second of training steps, losses and optimiser included."""
    kinds: dict[str, dict[str, Any]] = {"dsmoe": {}, "dense": {"kind": "dense", "num_experts": 1}}
    steps = model_steps(dict(plan.model), kinds, plan.batch, DTYPES[dtype_name])
    seconds = interleaved_seconds(steps, plan.rounds, advance=advance)
    faster = ratio(seconds["dense"], seconds["dsmoe"])
    tokens = plan.batch[0] * plan.batch[1]
    return {
        "dtype": dtype_name,
        "num_params": _num_params(steps["dsmoe"].model),
        "num_params_dense": _num_params(steps["dense"].model),
        "tokens": tokens,
        "tokens_per_second": tokens / statistics.median(seconds["dsmoe"]),
        "tokens_per_second_dense": tokens / statistics.median(seconds["dense"]),
        "tokens_per_second_ratio_to_dense": faster["median"],
        "tokens_per_second_ratio_to_dense_quartiles": [faster["low"], faster["high"]],
        "peak_bytes": peak_bytes(steps["dsmoe"]),
        "peak_bytes_dense": peak_bytes(steps["dense"]),
        "seconds": seconds,
    }


def _num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def measure_growth(plan: Plan, advance: Callable[[], Any]) -> dict[str, list[dict[str, Any]]]:
    """How the cost of a step grows: one quantity at a time, in float32, each point against its dense twin.

    Returns:
        What grows to points of "value", "time_ratio_to_dense" and "milliseconds" of the dense yardstick and ours.
    """
    curves = {}
    for quantity, values in plan.growth.items():
        curves[quantity] = [_growth_point(quantity, value, plan, advance) for value in values]
    return curves


def _growth_point(quantity: str, value: int, plan: Plan, advance: Callable[[], Any]) -> dict[str, Any]:
    hidden_size, num_experts, width = plan.layers[0]
    steps: Mapping[str, Callable[[], Any]]
    if quantity in ("experts", "width"):
        total = value if quantity == "width" else num_experts * width
        experts = value if quantity == "experts" else num_experts
        sizes = (hidden_size, experts, total // experts)
        layer = layer_steps(sizes, plan.tokens // 2, torch.float32, recompute=False)
        steps = {"ours": layer["wide"], "dense": layer["dense"]}
    else:
        config = {**plan.model, "num_hidden_layers": min(2, plan.model["num_hidden_layers"])}
        rows, length = plan.batch
        if quantity == "layers":
            config["num_hidden_layers"] = value
        else:
            # as many tokens at every length
            rows, length = max(1, rows * length // value), value
            config["max_position_embeddings"] = max(value, config["max_position_embeddings"])
        kinds: dict[str, dict[str, Any]] = {"ours": {}, "dense": {"kind": "dense", "num_experts": 1}}
        steps = model_steps(config, kinds, (rows, length), torch.float32)
    seconds = interleaved_seconds(steps, plan.growth_rounds, advance=advance)
    return {
        "value": value,
        "time_ratio_to_dense": ratio(seconds["ours"], seconds["dense"])["median"],
        "milliseconds": 1e3 * statistics.median(seconds["ours"]),
        "milliseconds_dense": 1e3 * statistics.median(seconds["dense"]),
    }
