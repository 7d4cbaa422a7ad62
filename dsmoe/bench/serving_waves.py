"""Requests in waves, for engines without a scheduler: as many at a time as there is room for, all of one length.

Since all requests have the same length, a scheduler that refills free places would form the same batches.
"""

import time
from collections.abc import Callable, Sequence

Clock = Callable[[], None]
Wave = Callable[[Sequence[Sequence[int]], int, Clock], None]


def in_waves(
    prompts: Sequence[Sequence[int]], output_tokens: int, concurrency: int, wave: Wave
) -> tuple[list[float], list[float]]:
    """Answer all prompts.

    Args:
        prompts: token ids, all of one length.
        output_tokens: of each answer.
        concurrency: prompts of a wave.
        wave: given prompts, output tokens, and what to call when the first token of them all is there.

    Returns:
        Seconds from the start to the first and to the last token of each request.
    """
    first: list[float] = []
    last: list[float] = []
    start = time.perf_counter()
    for place in range(0, len(prompts), concurrency):
        part = prompts[place : place + concurrency]
        moments: list[float] = []
        wave(part, output_tokens, lambda moments=moments: moments.append(time.perf_counter() - start))  # type: ignore[misc]
        first += moments[:1] * len(part)
        last += [time.perf_counter() - start] * len(part)
    return first, last
