"""From the times of one model in one engine to a row of the results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe.bench.timing import ratio

# of every row, failed ones included
MEASURED = (
    "tokens_per_second",
    "requests_per_second",
    "num_params_total",
    "num_params_active",
    "model_memory_bytes",
    "peak_memory_bytes",
    "kv_tokens",
)


def failed_row(name: str, kind: str, engine: str, setting: Mapping[str, Any], error: str) -> dict[str, Any]:
    """The row of a model that couldn't be measured: None for all numbers, and why."""
    row = {"model": name, "kind": kind, "engine": engine, "setting": setting["name"], "error": error}
    return {**row, **dict.fromkeys(MEASURED), "setting_numbers": _numbers(setting)}


def row_of(
    name: str,
    kind: str,
    engine: str,
    setting: Mapping[str, Any],
    numbers: Mapping[str, Any],
    loaded: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A row of the results.

    Args:
        name: the model's.
        kind: the model's.
        engine: its name.
        setting: fields of `Setting`, with the concurrency that was used.
        numbers: further fields of the row.
        loaded: the child's answer when it was ready.
        rounds: "full" and "first_tokens" (None with prompts of one token) of each, as the child answered.
    """
    requests, tokens_in, tokens_out = (setting[key] for key in ("requests", "input_tokens", "output_tokens"))
    full = [one["full"] for one in rounds]
    seconds = [max(one["last"]) for one in full]
    rates = [requests * tokens_out / value for value in seconds]
    prefill, decode = [0.0], rates  # prompts of one token: the first step is a step of decoding
    if tokens_in > 1:
        prefill = [max(one["first_tokens"]["first"]) for one in rounds]
        decode = [requests * (tokens_out - 1) / max(a - b, 1e-9) for a, b in zip(seconds, prefill)]
    latencies = sorted(value for one in full for value in one["last"])
    firsts = sorted(value for one in full for value in one["first"])
    peaks = [loaded["load_peak_bytes"], *(one["serving_peak_bytes"] for one in full)]
    return {
        "model": name,
        "kind": kind,
        "engine": engine,
        "setting": setting["name"],
        "tokens_per_second": statistics.median(rates),
        "requests_per_second": requests / statistics.median(seconds),
        "tokens_per_second_by_round": rates,
        "prefill_tokens_per_second": None
        if tokens_in == 1
        else requests * tokens_in / statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
        "latency_p50_seconds": percentile(latencies, 0.5),
        "latency_p95_seconds": percentile(latencies, 0.95),
        "time_to_first_token_p50_seconds": percentile(firsts, 0.5),
        "time_to_first_token_p95_seconds": percentile(firsts, 0.95),
        **numbers,
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "serving_peak_memory_bytes": max((peak for peak in peaks[1:] if peak is not None), default=None),
        "rounds": len(rounds),
        "setting_numbers": _numbers(setting),
        "engine_version": full[-1]["engine_version"],
        "options": full[-1]["options"],
    }


def add_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give every measured row of one engine and setting its ratio to the dense twin, round by round.

    Args:
        rows: of one engine and setting; without a measured dense twin they stay as they are.
    """
    dense = next((row for row in rows if row["model"] == "dense" and "error" not in row), None)
    for row in rows:
        if dense is not None and "error" not in row:
            rates = row["tokens_per_second_by_round"], dense["tokens_per_second_by_round"]
            row["tokens_per_second_ratio_to_dense"] = ratio(*rates)
    return rows


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values doesn't exceed.

    Args:
        ordered: ascending, at least one.
        share: above 0, up to 1.
    """
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _numbers(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in setting.items() if key != "name"}
