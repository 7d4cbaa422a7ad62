"""Runs from the trainer's run folders, or from the results of a study of them, counted from their configs."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dsmoe.accounting import active_experts, count_parameters, total_parameters
from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.planner.fit.runs import Run, checked

SUMMARY, LOG = "summary.json", "log.jsonl"


def read_folder(folder: Path) -> tuple[list[Run], list[str]]:
    """Read every finished run in a folder: its own summary.json, or those at any depth below.

    Runs that started from another model (`train.init_from`; polished ones do) are left out: the law is one of training
    from scratch, and their tokens are not all that their model has seen. The loss is the sparse one where it was
    measured. Active parameters of a DS-MoE follow from the mean active experts of its summary, or in older runs from
    those that its log holds last.

    Returns:
        The runs in the order of their paths (none, if all were left out), and notes on what was assumed and left out.

    Raises:
        UserError: no finished run, or a summary that lacks what is needed.
    """
    own = folder / SUMMARY
    paths = [own] if own.is_file() else sorted(folder.rglob(SUMMARY))
    if not paths:
        raise UserError(
            f"{folder}: no {SUMMARY} in it or below; give folders of finished runs, or a CSV file"
        )
    runs, notes, continued = [], set(), []
    for path in paths:
        summary = read_json(path)
        if _started_from(summary):
            continued.append(str(path.parent))
            continue
        run, assumed = _run_of(summary, path, path.with_name(LOG))
        runs.append(run)
        notes.update(assumed)
    return runs, [*sorted(notes), *_left_out(continued, folder)]


def read_study(path: Path) -> tuple[list[Run], list[str]]:
    """Read the runs of a study's results.json (of its output folder or its record).

    Returns:
        As `read_folder`.

    Raises:
        UserError: no runs in it, or one that lacks what is needed.
    """
    found = read_json(path)
    rows = found.get("runs") if isinstance(found, Mapping) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: no entry 'runs'; it must be the results.json of a study (train/study.py)")
    runs, notes, continued = [], set(), []
    for row in rows:
        if _started_from(row):
            continued.append(_name(row, path))
            continue
        model = _entry(row, "model", path, "runs[].")
        run, assumed = _run_of({**row, "config": {"model": model}}, path, None)
        runs.append(run)
        notes.update(assumed)
    return runs, [*sorted(notes), *_left_out(continued, path)]


def _started_from(summary: Any) -> Any:
    """The model that a run started from, by its summary or its row of a study; nothing: it was trained from scratch."""
    if not isinstance(summary, Mapping):
        return None
    config, settings = summary.get("config"), summary.get("settings")
    train = config.get("train") if isinstance(config, Mapping) else None
    in_config = train.get("init_from") if isinstance(train, Mapping) else None
    return in_config or (settings.get("train.init_from") if isinstance(settings, Mapping) else None)


def _left_out(continued: Sequence[str], source: Path) -> list[str]:
    if not continued:
        return []
    return [
        f"{source}: left out, as they started from another model (train.init_from): {len(continued)} "
        f"{'run' if len(continued) == 1 else 'runs'}, the first {continued[0]}"
    ]


def _run_of(summary: Any, path: Path, log: Path | None) -> tuple[Run, list[str]]:
    """The run that a summary tells of, and notes; `path` is for messages."""
    described = _entry(_entry(summary, "config", path), "model", path, "config.")
    if not isinstance(described, Mapping):
        raise UserError(f"{path}: model is {described!r}; it must be the model's configuration")
    model = SimpleNamespace(**described)
    notes: list[str] = []
    try:
        kind = str(_entry(summary, "kind", path))
        means = _mean_active(summary, log, model) if kind == "dsmoe" else None
        share = None if means is None else sum(means["mlp"]) / len(means["mlp"]) / model.num_experts
        total = total_parameters(model)
        if kind == "dsmoe" and means is None and _policy_is_dense(model):
            active = total
            notes.append(
                f"{_name(summary, path)}: no mean active experts in {SUMMARY} or {LOG}, so all parameters count as active"
            )
        else:
            active = count_parameters(model, means).active
        experts = float(model.num_experts)
        if kind == "smoe":
            experts, note = _expansion(model)
            notes.extend(note)
    except AttributeError as error:
        raise UserError(
            f"{path}: config.model has no {error.name!r}; it must be a summary of the trainer"
        ) from None
    except (TypeError, KeyError, ArithmeticError) as error:  # a value of the wrong type, or a size of 0
        raise UserError(
            f"{path}: the parameters of run {_name(summary, path)!r} can't be counted ({error}); it must be a summary of "
            "the trainer"
        ) from None
    key = "validation_loss_sparse" if "validation_loss_sparse" in summary else "validation_loss"
    run = Run(
        kind=kind,
        num_experts=experts,
        num_params_active=float(active),
        num_params_total=float(total),
        tokens=_number(summary, "tokens", path),
        loss=_number(summary, key, path),
        name=_name(summary, path),
        seed=_seed(summary, path),
        active_share=share,
        corpus=_corpus(summary),
        windows=summary.get("evaluation_windows", "first"),
        vocab_size=int(model.vocab_size),
    )
    return checked(run, str(path)), notes


def _entry(found: Any, key: str, path: Path, prefix: str = "") -> Any:
    if not isinstance(found, Mapping) or key not in found:
        raise UserError(f"{path}: no entry {prefix}{key!s}; it must be a summary of the trainer")
    return found[key]


def _corpus(summary: Mapping[str, Any]) -> str | None:
    """From a run's summary, or a row of a study."""
    environment = summary.get("environment")
    return environment.get("corpus") if isinstance(environment, Mapping) else summary.get("corpus")


def _name(summary: Mapping[str, Any], path: Path) -> str:
    return str(summary.get("name", path.parent.name))


def _seed(summary: Mapping[str, Any], path: Path) -> int:
    seed = summary.get("seed", 0)
    if not isinstance(seed, int):
        raise UserError(f"{path}: seed is {seed!r}; it must be a whole number")
    return seed


def _number(summary: Any, key: str, path: Path) -> float:
    value = _entry(summary, key, path)
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{path}: {key} is {value!r}; it must be a finite number above 0")
    return float(value)


def _policy_is_dense(model: Any) -> bool:
    try:
        return all(
            mean == getattr(model, name)
            for part, name in (("mlp", "num_experts"), ("attention", "num_attention_experts"))
            for mean in active_experts(model, part)
        )
    except UserError:  # the count depends on the text: not dense
        return False


def _mean_active(summary: Any, log: Path | None, model: Any) -> dict[str, list[float]] | None:
    """Mean active MLP experts per layer at the sparse policy, as accounting wants them; None if nothing says them."""
    found = summary.get("active_experts_sparse")
    if found is None and log is not None and log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found = entry.get("active_experts", found)
    if found is None:
        return None
    # a token keeps at least one expert; means are rounded in the log
    return {"mlp": [min(float(model.num_experts), max(1.0, float(mean))) for mean in found]}


def _expansion(model: Any) -> tuple[float, list[str]]:
    """The law's E of an SMoE (experts per active expert), with a note where its experts are not the law's."""
    means = active_experts(model, "mlp")
    active = sum(means) / len(means)
    if active == 1:
        return float(model.num_experts), []
    note = (
        f"SMoEs with {model.num_experts} experts of which {active:g} run count as E = {model.num_experts / active:g}: "
        "the law's experts are full-size and top-1, so finer ones are outside of it"
    )
    return model.num_experts / active, [note]
