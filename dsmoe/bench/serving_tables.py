"""The serving benchmark as tables for people and as a plot like the article's figure 1."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe.figures import KIND_COLOURS, pyplot, save_figure
from dsmoe.planner.plots import SMOE_COLOURS

_STYLES = {
    "dense": (KIND_COLOURS["dense"], "s"),
    "smoe": (SMOE_COLOURS[3], "^"),
    "dsmoe": (KIND_COLOURS["dsmoe"], "*"),
    "extra": ("#777777", "o"),
}


def result_table(results: Mapping[str, Any]) -> str:
    """All rows as Markdown tables.

    Args:
        results: of `dsmoe.bench.serving_command.measure`.
    """
    rows = results["rows"]
    settings = list(dict.fromkeys(map(_setting, rows)))
    threads = {row["threads"] for row in rows}
    counts = {row.get("rounds", results["rounds"]) for row in rows}
    rounds = " or ".join(map(str, sorted(counts)))
    lines = [
        f"Weights and cache of every model within {results['memory_bytes'] / 1e9:g} GB, {results['dtype']}, "
        f"{' and '.join(_threads(count) for count in sorted(threads))}. Tokens/s are generated tokens, medians "
        f"over {rounds} interleaved rounds; x dense: round by round, with its quartiles.",
        "",
        "| engine | model | parameters | active | model MB | room for KV tokens | "
        + " | ".join(f"tokens/s, {setting} (x dense)" for setting in settings)
        + " |",
        "|---|---|---|---|---|---|" + "---|" * len(settings),
    ]
    for engine, model, count in dict.fromkeys((row["engine"], row["model"], row["threads"]) for row in rows):
        same = (engine, model, count)
        found = {_setting(row): row for row in rows if (row["engine"], row["model"], row["threads"]) == same}
        cells = [_speed(found.get(setting)) for setting in settings]
        shown = next((row for row in found.values() if "error" not in row), next(iter(found.values())))
        where = f"{engine}, {_threads(count)}" if len(threads) > 1 else engine
        lines.append(f"| {where} | {model} | {_sizes(shown)} | " + " | ".join(cells) + " |")
    lines += ["", *_phases(rows), "", *_errors(rows)]
    return "\n".join(lines).strip()


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _setting(row: Mapping[str, Any]) -> str:
    numbers = row["setting_numbers"]
    size = f"{numbers['input_tokens']} in, {numbers['output_tokens']} out"
    return f"{row['setting']} ({size}, {numbers['requests']} request{'s' if numbers['requests'] > 1 else ''})"


def _sizes(row: Mapping[str, Any]) -> str:
    if row["num_params_total"] is None:
        return "- | - | - | -"
    active = row["num_params_active"]
    return (
        f"{row['num_params_total'] / 1e6:.0f}M | {'-' if active is None else f'{active / 1e6:.0f}M'} | "
        f"{row['model_memory_bytes'] / 1e6:.0f} | {row['kv_tokens']:,}"
    )


def _speed(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "failed"
    text = f"{row['tokens_per_second']:.1f}"
    found = row.get("tokens_per_second_ratio_to_dense")
    if found is None or row["kind"] == "dense":
        return text
    return f"{text} ({found['median']:.2f}x, {found['low']:.2f}-{found['high']:.2f})"


def _phases(rows: list[dict[str, Any]]) -> list[str]:
    """Where the time goes: both phases apart, latencies and memory."""
    lines = [
        "Where the time goes. Prefill: tokens/s of a run that ends with the first token of each request; decode: the "
        "other tokens in the rest of the time. Latencies count from the start, when all requests are there.",
        "",
        "| engine | setting | model | prefill tokens/s (x dense) | decode tokens/s (x dense) | requests/s "
        "| first token s | latency s, p50 / p95 | at a time | peak MB (loading, serving) | of it libraries |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            continue
        dense = _dense_of(rows, row)
        cells = [
            f"{row['engine']}, {_threads(row['threads'])}", _setting(row), row["model"],
            _ratio(row, dense, "prefill_tokens_per_second"), _ratio(row, dense, "decode_tokens_per_second"),
            f"{row['requests_per_second']:.3f}", f"{row['time_to_first_token_p50_seconds']:.3f}",
            f"{row['latency_p50_seconds']:.2f} / {row['latency_p95_seconds']:.2f}",
            str(row["setting_numbers"]["concurrency"]),
            f"{_megabytes(row['peak_memory_bytes'])}, {_megabytes(row['serving_peak_memory_bytes'])}",
            _megabytes(row["library_memory_bytes"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    versions = sorted({f"{row['engine']}: {row['engine_version']}" for row in rows if "error" not in row})
    return [*lines, "", "Engines: " + "; ".join(versions) + "."] if versions else []


def _dense_of(rows: list[dict[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    same = ("engine", "threads", "dtype")
    for other in rows:
        alike = all(other[k] == row[k] for k in same) and _setting(other) == _setting(row)
        if alike and other["model"] == "dense" and "error" not in other:
            return other
    return None


def _ratio(row: Mapping[str, Any], dense: Mapping[str, Any] | None, field: str) -> str:
    if row[field] is None:
        return "-"
    text = f"{row[field]:.0f}"
    return text if dense is None or dense is row else f"{text} ({row[field] / dense[field]:.2f}x)"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    return [
        f"Failed: {row['engine']}, {row['setting']}, {row['model']}: {row['error']}"
        for row in rows
        if "error" in row
    ]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Throughput against memory, one panel for each engine and setting, one marker for each model.

    Args:
        results: as above.
        path: PNG to write.
    """
    groups = dict.fromkeys((row["engine"], _setting(row)) for row in results["rows"])
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = pyplot().subplots(lines, columns, figsize=(3.4 * columns, 3.0 * lines), squeeze=False)
    for panel in axes.flat[len(groups) :]:
        panel.set_axis_off()
    for panel, group in zip(axes.flat, groups):
        for row in results["rows"]:
            if (row["engine"], _setting(row)) == group and "error" not in row:
                colour, marker = _STYLES[row["kind"]]
                panel.scatter(
                    row["model_memory_bytes"] / 1e6, row["tokens_per_second"], s=90,
                    color=colour, marker=marker, label=row["model"],
                )  # fmt: skip
        panel.set_title(f"{group[0]}\n{group[1]}", fontsize=8)
        panel.set_xlabel("model memory, MB")
        panel.set_ylabel("tokens/s")
        panel.set_xlim(0, 1.15 * panel.dataLim.x1 if panel.collections else None)
        panel.set_ylim(0, 1.15 * panel.dataLim.y1 if panel.collections else None)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    save_figure(figure, path)
