"""Interleaved timing on pinned threads."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dsmoe.errors import UserError


def usable_cores() -> int:
    """Cores that the system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_threads(threads: Sequence[int]) -> Sequence[int]:
    """Numbers of threads as given on a command line.

    Raises:
        UserError: one of them is more than there are cores, or less than one.
    """
    usable = usable_cores()
    for count in threads:
        if not 1 <= count <= usable:
            raise UserError(f"--threads has {count}; this machine lets the process use 1 to {usable} cores")
    return threads


@contextmanager
def threads_in_use(threads: int) -> Iterator[list[int]]:
    """Run the block with so many torch threads, pinned to as many cores where the system can do that.

    Args:
        threads: number of threads.

    Yields:
        The cores (empty where threads can't be pinned).
    """
    before = torch.get_num_threads()
    can_pin = hasattr(os, "sched_setaffinity")
    allowed = sorted(os.sched_getaffinity(0)) if can_pin else []
    # the first core gets most of the system's own work
    cores = allowed[-threads:]
    try:
        if can_pin:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
        yield cores
    finally:
        if can_pin:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(before)


def interleaved_seconds(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    rounds_of: Mapping[str, int] | None = None,
    advance: Callable[[], Any] = lambda: None,
    shuffle: bool = False,
    in_a_row: int = 1,
) -> dict[str, list[float]]:
    """Wall-clock seconds of each contestant, taken in turns so that a change of the machine's speed meets all.

    Args:
        steps: name to what is timed.
        rounds: timed rounds; one more before them isn't counted.
        rounds_of: fewer rounds of contestants that are too slow for all.
        advance: called after each turn (a progress bar).
        shuffle: another order each round, the same in every run. A step of microseconds is slower right after one
            that has filled the caches, so that in a fixed order the place would count.
        in_a_row: steps of a contestant before the next one's turn, timed together. After another's turn the caches hold
            neither the interpreter's code nor ours, which a program that does nothing else never meets.

    Returns:
        Name to seconds of a step in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, generator = list(steps.items()), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for number in range(-1, rounds):
            if shuffle:
                generator.shuffle(order)
            for name, step in order:
                if number >= (rounds_of or {}).get(name, rounds):
                    continue
                start = time.perf_counter()
                for _ in range(in_a_row):
                    step()
                if number >= 0:
                    seconds[name].append((time.perf_counter() - start) / in_a_row)
                advance()
    finally:
        gc.enable()
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and spread of the ratio of two contestants, round by round.

    Returns:
        "median", "low" and "high" (the quartiles) over the rounds that both ran.
    """
    ratios = sorted(a / b for a, b in zip(ours, theirs))
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {"median": statistics.median(ratios), "low": low, "high": high}
