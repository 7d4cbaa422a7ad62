"""Everything that a run must remember besides weights and optimiser, so that resuming continues it to the bit.

Nothing else changes from step to step: the order of the text, learning rates and coefficients follow from its number.
"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsmoe.trainer.cost import MaskedSteps
from dsmoe.trainer.guard import Guard
from dsmoe.trainer.mask_phase import ThresholdController
from dsmoe.trainer.mi_control import MIController
from dsmoe.trainer.statistics import RunningMean


@dataclass
class LoopState:
    """State of the loop.

    Attributes:
        controller: thresholds of the mask phase.
        guard: counters and running scales of the guard.
        running: the running p(e), where that is asked for.
        mi_control: the steered coefficients of the mutual information, where that is asked for.
        masked: what the steps of the mask phase computed.
        step: optimiser steps done, skipped ones included; it is also the position in the text.
        seconds: time spent by the processes before this one.
        started: when this process took over.
    """

    controller: ThresholdController
    guard: Guard
    running: RunningMean | None
    mi_control: MIController | None = None
    masked: MaskedSteps = field(default_factory=MaskedSteps)
    step: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds of training, over all processes that had a part in it."""
        return self.seconds + time.perf_counter() - self.started

    def record(self) -> dict[str, Any]:
        """The part of the state that fits JSON; Python's floats come back from it to the bit."""
        return {
            "step": self.step,
            "seconds": self.elapsed(),
            "controller": self.controller.state(),
            "guard": self.guard.state(),
            "masked": self.masked.state(),
            **({} if self.mi_control is None else {"mi_control": self.mi_control.state()}),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The rest: running p(e) and random states."""
        return {**random_states(), **(self.running.tensors() if self.running is not None else {})}

    def load(self, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what `record` and `tensors` gave."""
        self.step, self.seconds = record["step"], record["seconds"]
        self.controller.load(record["controller"])
        self.guard.load(record["guard"])
        self.masked.load(record.get("masked", {}))
        if self.mi_control is not None:
            self.mi_control.load(record.get("mi_control", {}))
        if self.running is not None and "running.weight" in tensors:
            self.running.load(tensors)
        set_random_states(tensors)


def random_states() -> dict[str, Tensor]:
    """States of torch's, numpy's and Python's generators (the same in all processes, which are seeded alike)."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    words, position = numpy_state["state"]["key"], numpy_state["state"]["pos"]
    states = {
        "torch_rng": torch.get_rng_state(),
        "numpy_rng": torch.tensor([*words.tolist(), position]),
        "python_rng": torch.tensor(random.getstate()[1]),
    }
    if torch.cuda.is_available():
        states["cuda_rng"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Restore the states of `random_states`."""
    torch.set_rng_state(states["torch_rng"])
    *words, position = states["numpy_rng"].tolist()
    np.random.set_state(("MT19937", np.array(words, dtype=np.uint32), position, 0, 0.0))  # noqa: NPY002
    random.setstate((3, tuple(states["python_rng"].tolist()), None))
    if torch.cuda.is_available() and "cuda_rng" in states:
        torch.cuda.set_rng_state(states["cuda_rng"])
