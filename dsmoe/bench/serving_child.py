"""The process of one model in one engine: loads it, then answers rounds on demand; lines of JSON in and out.

In: first the job, then {"requests", "input_tokens", "output_tokens", "seed"} per round; the end of the input ends it.
Out: {"ready": ...} once loaded, per round {"first": [seconds], "last": [seconds], "memory": ...}, or {"error": text}.
This module and those of engines without torch import none, so that the memory of the process is the engine's.
"""

import contextlib
import importlib
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from dsmoe.bench.serving_engines import ENGINES


def main() -> int:
    """Run until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what engines print goes to the log

    def say(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        _serve(say)
    except BaseException as error:
        say({"error": _one_line(error)})
        if not isinstance(error, Exception):
            raise
        return 1
    # engines with threads of their own may not come to an end by themselves
    sys.stderr.flush()
    os._exit(0)


def _serve(say: Any) -> None:
    job = json.loads(sys.stdin.readline())
    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])
    module = importlib.import_module(ENGINES[job["engine"]])
    libraries = memory()["now"]
    engine = module.Engine(job)
    loaded = memory()
    say({"ready": True, "library_memory_bytes": libraries, "load_peak_bytes": loaded["peak"]})
    start_of_peak()
    for line in sys.stdin:
        order = json.loads(line)
        prompts = prompts_of(order, job["vocab_size"])
        first, last = engine.run(prompts, order["output_tokens"])
        peak = memory()["peak"]
        say({"first": first, "last": last, "serving_peak_bytes": peak, **engine.facts()})


def prompts_of(order: dict[str, Any], vocab_size: int) -> list[list[int]]:
    """Random tokens, the same for all engines and models with one vocabulary."""
    draw = random.Random(order["seed"])
    return [
        [draw.randrange(vocab_size) for _ in range(order["input_tokens"])] for _ in range(order["requests"])
    ]


def memory() -> dict[str, int | None]:
    """Resident memory of this process in bytes, now and at its peak; None where Linux's /proc is missing."""
    found: dict[str, int | None] = {"now": None, "peak": None}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            for name, field in (("now", "VmRSS:"), ("peak", "VmHWM:")):
                if line.startswith(field):
                    found[name] = int(line.split()[1]) * 1024
    return found


def start_of_peak() -> None:
    """From here on, the peak is that of serving, without loading."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
