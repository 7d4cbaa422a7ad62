"""Results as Markdown tables in the shape of the paper's (arXiv 2404.05567, table 1)."""

from collections.abc import Mapping, Sequence
from typing import Any

from dsmoe.evaluation.comparison import average

TASK_TITLES = {
    "hellaswag": "HellaSwag",
    "piqa": "PIQA",
    "winogrande": "WinoGrande",
    "sciq": "SciQ",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
}
_MISSING = "-"


def task_average(tasks: Mapping[str, Mapping[str, Any]], metric: str = "acc") -> tuple[float, float] | None:
    """Mean over tasks of a metric, and its standard error; None without tasks.

    Args:
        tasks: task to {"acc", "stderr", "acc_norm", "acc_norm_stderr"}.
        metric: "acc" or "acc_norm"; for the latter a task without it (WinoGrande) counts with its acc.
    """
    pairs = []
    for scores in tasks.values():
        value, stderr = scores.get(metric), scores.get("stderr" if metric == "acc" else "acc_norm_stderr")
        if value is None:
            value, stderr = scores["acc"], scores["stderr"]
        pairs.append((value, float("inf") if stderr is None else stderr))
    return average(pairs) if pairs else None


def results_table(models: Sequence[Mapping[str, Any]], metric: str = "acc") -> str:
    """One row per model: tasks (times 100), average, then losses, parameters and speed if `metric` is "acc".

    Columns without any value are left out.

    Args:
        models: the "models" of a results file.
        metric: "acc" or "acc_norm".
    """
    tasks = [task for task in TASK_TITLES if any(task in model["tasks"] for model in models)]
    tasks += [task for model in models for task in model["tasks"] if task not in tasks]
    tasks = list(dict.fromkeys(tasks))
    header = ["model", *(TASK_TITLES.get(task, task) + _mark(models, task) for task in tasks), "avg"]
    rows = [
        [model["name"], *(_task(model, task, metric) for task in tasks), _average(model, metric)]
        for model in models
    ]
    for title, values in _extras(models) if metric == "acc" else ():
        if any(value != _MISSING for value in values):
            header.append(title)
            for row, value in zip(rows, values, strict=True):
                row.append(value)
    return markdown([header, *rows])


def acc_norm_note(models: Sequence[Mapping[str, Any]]) -> str:
    """Line under an acc_norm table that names the tasks without that metric; empty if there are none."""
    without = {
        TASK_TITLES.get(task, task): None
        for model in models
        for task, scores in model["tasks"].items()
        if scores.get("acc_norm") is None
    }
    return f"No acc_norm: {', '.join(without)}; the average takes acc there." if without else ""


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads as plain text.

    Args:
        cells: rows of equal length, the header first; the first column is aligned to the left.
    """
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]

    def line(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def _mark(models: Sequence[Mapping[str, Any]], task: str) -> str:
    # SciQ is published on test; a score on another split must say so
    splits = {model["tasks"][task].get("split") for model in models if task in model["tasks"]}
    return " (val)" if task == "sciq" and "validation" in splits else ""


def _task(model: Mapping[str, Any], task: str, metric: str) -> str:
    value = model["tasks"].get(task, {}).get(metric)
    return _MISSING if value is None else f"{100 * value:.1f}"


def _average(model: Mapping[str, Any], metric: str) -> str:
    mean = task_average(model["tasks"], metric)
    return _MISSING if mean is None else f"{100 * mean[0]:.1f}"


def _extras(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    def column(title: str, key: str, form: str, scale: float = 1.0) -> tuple[str, list[str]]:
        values = [model.get(key) for model in models]
        return title, [_MISSING if value is None else form.format(scale * value) for value in values]

    return [
        column("val loss", "validation_loss", "{:.4f}"),
        column("bits/byte", "bits_per_byte", "{:.4f}"),
        ("wiki ppl", [_wikitext(model) for model in models]),
        ("total", [count(model.get("num_params_total")) for model in models]),
        ("active", [count(model.get("num_params_active")) for model in models]),
        column("MLP active", "mlp_active_fraction", "{:.0f}%", 100),
        column("decode tok/s", "decode_tokens_per_second", "{:.1f}"),
    ]


def _wikitext(model: Mapping[str, Any]) -> str:
    scores = model.get("wikitext")
    return f"{scores['word_perplexity']:.2f}" if scores else _MISSING


def count(value: int | None) -> str:
    """A parameter count in thousands (K) or millions (M)."""
    if value is None:
        return _MISSING
    if value < 1_000_000:
        return f"{value / 1e3:.0f}K"
    return f"{value / 1e6:.1f}M" if value < 100_000_000 else f"{value / 1e6:.0f}M"
