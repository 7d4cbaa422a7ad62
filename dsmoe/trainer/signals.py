"""SIGTERM and Ctrl-C: note the signal, let the loop finish its step and write a checkpoint."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# launchers pass on a signal that the terminal has sent to all of the group: that one is no second wish
_SAME_SIGNAL_SECONDS = 1.0


class Stopped(Exception):
    """Training ended because of a signal, with a checkpoint; the exit status is 128 + the signal's number."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(
            f"{signal.Signals(number).name}: stopped after step {step}, with a checkpoint; --train.resume true continues"
        )
        self.status = 128 + number


class StopSignals:
    """While it is entered, the first SIGTERM or SIGINT is noted, and a second one ends the process at once.

    Args:
        speak: say on stderr that the signal was noted.

    Attributes:
        received: number of the signal that came, or 0.
    """

    def __init__(self, speak: bool = True) -> None:
        self.speak = speak
        self.received = 0
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        # Python allows handlers in the main thread only; elsewhere the caller deals with signals
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._at > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.received:
            self.received, self._at = number, time.monotonic()
            if self.speak:
                # not print: the signal may have come in the middle of another one
                name = signal.Signals(number).name
                os.write(
                    2,
                    f"\n{name}: finishing the step and writing a checkpoint; once more ends at once\n".encode(),
                )
