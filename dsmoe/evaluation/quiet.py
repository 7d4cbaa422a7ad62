"""lm-eval and the libraries below it, without their log lines and their many progress bars."""

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class TruncationCounter(logging.Handler):
    """Counts lm-eval's warnings about requests that do not fit the model and were cut on the left."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count the record if it is such a warning."""
        if "exceeds model's maximum length" in record.getMessage():
            self.count += 1


def _without_bar(iterable: Iterable[Any], **_: Any) -> Iterable[Any]:
    return iterable


# What has no switch of its own: the bar over building a task's prompts, and two collectors of the environment
# that start programs (git writes to the terminal); `dsmoe.environment` records versions and hardware instead.
_REPLACEMENTS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("lm_eval.api.task", "tqdm", _without_bar),
    ("lm_eval.evaluator", "get_git_commit_hash", lambda: None),
    ("lm_eval.evaluator", "add_env_info", lambda results: None),
)


@contextmanager
def quiet_harness() -> Iterator[TruncationCounter]:
    """Silence lm-eval inside the block; yields the counter of truncated requests, whose warnings it hides."""
    import datasets

    logger, counter = logging.getLogger("lm_eval"), TruncationCounter()
    before = logger.level, logger.handlers[:], logger.propagate
    bars = datasets.is_progress_bar_enabled()
    replaced = [(importlib.import_module(module), name, new) for module, name, new in _REPLACEMENTS]
    originals = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    logger.setLevel(logging.WARNING)
    logger.handlers, logger.propagate = [counter], False
    datasets.disable_progress_bars()
    for module, name, new in replaced:
        setattr(module, name, new)
    try:
        yield counter
    finally:
        for module, name, original in originals:
            setattr(module, name, original)
        if bars:
            datasets.enable_progress_bars()
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1], before[2]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide transformers' progress bar over weights inside the block."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
