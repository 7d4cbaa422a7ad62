"""Runs on one process and on several, for comparing them: their text, their launch and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from dsmoe.data.prepare import prepare
from dsmoe.data.recipe import Recipe, Source
from dsmoe.errors import UserError
from dsmoe.files import write_json


def make_text(folder: Path, documents: int = 300) -> Path:
    """Prepare a small token folder of random words in `folder`; returns it."""
    random, words = Random(0), [f"w{index}" for index in range(60)]
    lines = [json.dumps({"text": " ".join(random.choices(words, k=25))}) for _ in range(documents)]
    source = folder / "text.jsonl"
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = Recipe(sources={"words": Source(str(source))}, train_tokenizer=300, validation_fraction=0.1)
    prepare(recipe, folder / "corpus")
    return folder / "corpus"


def command_line(settings: Mapping[str, Any]) -> list[str]:
    """Arguments of `train/pretrain.py` for settings by dotted name."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value) if isinstance(value, str | Path) else json.dumps(value)]
    return words


def run(settings: Mapping[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """One run for `launch`; it is stopped after so many steps (None: goes to its end)."""
    return {"arguments": command_line(settings), "stop_after": stop_after}


def launch(runs: Sequence[dict[str, Any]], home: Path, *, processes: int, threads: int) -> None:
    """Train some runs, one after the other.

    Args:
        runs: made by `run`.
        home: folder for the list of them.
        processes: how many share each run.
        threads: torch threads of each process.

    Raises:
        UserError: one ended badly; the message has the end of its output.
    """
    write_json(home / "runs.json", list(runs))
    starter = [sys.executable]
    if processes > 1:
        starter += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ACCELERATE_") and name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
    }
    done = subprocess.run(
        [*starter, "-m", "dsmoe.trainer.compare_child", str(home / "runs.json")],
        env={**environment, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        output = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        told = [line for line in output if "rror: " in line] or output or ["no output"]
        raise UserError(
            f"a run on {processes} process(es) ended with status {done.returncode}: {told[0].strip()}"
        )


def losses(folder: Path) -> list[float]:
    """Language-modelling loss of every step, as logged, in nats per token."""
    return [line["lm_loss"] for line in _log(folder) if "lm_loss" in line]


def tokens_per_second(folder: Path, skip: int) -> float:
    """Tokens a second over the steps after the first `skip`."""
    rates = [line["tokens_per_second"] for line in _log(folder) if "tokens_per_second" in line][skip:]
    return len(rates) / sum(1 / rate for rate in rates)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of two curves; infinite where they differ in length."""
    if len(ours) != len(theirs):
        return float("inf")
    return max(abs(a / b - 1) for a, b in zip(ours, theirs))


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
