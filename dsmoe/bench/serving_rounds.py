"""Measuring: every model in a process of its own, taking turns within an engine and a setting."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsmoe.bench.serving_models import Form
from dsmoe.bench.serving_process import Child, EngineFailureError, python_of
from dsmoe.bench.serving_rows import add_ratios, failed_row, row_of
from dsmoe.bench.serving_settings import Setting, kv_tokens
from dsmoe.errors import UserError

_WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Conditions:
    """What all measurements share.

    Attributes:
        memory_bytes: budget of weights and cache together.
        dtype: of weights and computation.
        threads: of an engine.
        cores: to which its process is pinned; empty: not pinned.
        rounds: timed rounds.
        python: interpreter of engines that aren't installed here; None: this one.
        timeout: seconds that an engine may take for one answer.
    """

    memory_bytes: float
    dtype: str
    threads: int
    cores: list[int]
    rounds: int
    python: str | None = None
    timeout: float = 900.0


@dataclass(frozen=True)
class Model:
    """A model of the benchmark.

    Attributes:
        name: in the tables.
        kind: "dense", "smoe", "dsmoe" or "extra".
        form: its form for an engine; may raise UserError.
    """

    name: str
    kind: str
    form: Callable[[str], Form]


class _Turn:
    """A model in an engine under a setting: its process and its times."""

    def __init__(self, model: Model, engine: str, setting: Setting, conditions: Conditions) -> None:
        self.model, self.engine, self.conditions = model, engine, conditions
        self.form = model.form(engine)
        self.kv_tokens = kv_tokens(
            conditions.memory_bytes, self.form.model_bytes, self.form.kv_bytes_per_token
        )
        self.setting = setting.within(self.kv_tokens)
        self.rounds: list[dict[str, Any]] = []
        python = python_of(engine, conditions.python)
        self.child = Child(self._job(), python, conditions.timeout)

    def _job(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "source": self.form.source,
            "native": self.form.native,
            "vocab_size": self.form.vocab_size,
            "dtype": self.conditions.dtype,
            "threads": self.conditions.threads,
            "cores": self.conditions.cores,
            "concurrency": self.setting.concurrency,
            "length": self.setting.length,
            "kv_bytes": self.kv_tokens * self.form.kv_bytes_per_token,
        }

    def load(self) -> None:
        """Load the model and run one round that isn't counted."""
        self.loaded = self.child.ask(self._job())
        self._run(min(_WARM_UP_TOKENS, self.setting.output_tokens), seed=-1)

    def time(self, number: int) -> None:
        """One timed round: all requests, then their first tokens alone."""
        full = self._run(self.setting.output_tokens, seed=2 * number)
        first = self._run(1, seed=2 * number + 1) if self.setting.input_tokens > 1 else None
        self.rounds.append({"full": full, "first_tokens": first})

    def _run(self, output_tokens: int, seed: int) -> dict[str, Any]:
        order = {
            "requests": self.setting.requests,
            "input_tokens": self.setting.input_tokens,
            "output_tokens": output_tokens,
            "seed": seed,
        }
        return self.child.ask(order)


def measure_group(
    models: Sequence[Model],
    engine: str,
    setting: Setting,
    conditions: Conditions,
    advance: Callable[[str], Any],
    tell: Callable[[str], Any],
) -> list[dict[str, Any]]:
    """The rows of one engine and setting, one for each model.

    Args:
        models: what is compared.
        engine: one of `ENGINES`.
        setting: as asked for; the memory budget may lower its concurrency.
        conditions: of all measurements.
        advance: called with the name of the case after each step.
        tell: called with a line about each model that can't be measured.
    """
    turns: dict[str, _Turn] = {}
    errors: dict[str, str] = {}

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except (UserError, EngineFailureError) as error:
            errors[name] = str(error)
            if name in turns:
                turns[name].child.close(0.0)
            tell(f"{name}, {engine}, {setting.name}: {error}")
        advance(f"{engine} {setting.name} {name}")

    def start(model: Model) -> None:
        turns[model.name] = _Turn(model, engine, setting, conditions)
        turns[model.name].load()

    try:
        for model in models:
            attempt(model.name, lambda model=model: start(model))  # type: ignore[misc]
        order = random.Random(0)
        for number in range(conditions.rounds):
            running = [name for name in turns if name not in errors]
            order.shuffle(running)
            for name in running:
                attempt(name, lambda turn=turns[name], number=number: turn.time(number))  # type: ignore[misc]
    finally:
        for turn in turns.values():
            turn.child.close()
    rows = []
    for model in models:
        if model.name in errors:
            shared = {"threads": conditions.threads, "dtype": conditions.dtype}
            failed = failed_row(model.name, model.kind, engine, asdict(setting), errors[model.name])
            rows.append({**failed, **shared})
        else:
            rows.append(_row(turns[model.name]))
    return add_ratios(rows)


def _row(turn: _Turn) -> dict[str, Any]:
    numbers: Mapping[str, Any] = {
        "threads": turn.conditions.threads,
        "dtype": turn.conditions.dtype,
        "num_params_total": turn.form.num_params_total,
        "num_params_active": turn.form.num_params_active,
        "model_memory_bytes": turn.form.model_bytes,
        "kv_tokens": turn.kv_tokens,
        "kv_bytes_per_token": turn.form.kv_bytes_per_token,
        "memory_budget_bytes": int(turn.conditions.memory_bytes),
        "library_memory_bytes": turn.loaded["library_memory_bytes"],
    }
    return row_of(
        turn.model.name, turn.model.kind, turn.engine, asdict(turn.setting), numbers, turn.loaded, turn.rounds
    )
