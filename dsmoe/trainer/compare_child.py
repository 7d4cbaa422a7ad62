"""Training runs one after the other in one process, which may be one of several that torchrun has started.

    python -m dsmoe.trainer.compare_child RUNS.json
    torchrun --nproc_per_node 2 -m dsmoe.trainer.compare_child RUNS.json

The file holds a list of {"arguments": the command line of `train/pretrain.py`, "stop_after": steps or null}. A run that
is to stop gets a SIGTERM after so many steps, as from a cluster, and leaves a checkpoint.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from dsmoe.files import read_json
from dsmoe.trainer.checkpointer import Checkpointer
from dsmoe.trainer.command import main as train
from dsmoe.trainer.signals import Stopped

_after_step = Checkpointer.after_step


def run_all(runs: Sequence[dict[str, Any]]) -> int:
    """Train each run; returns the first exit status that isn't the expected one, otherwise 0."""
    end_training = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign] # it ends the process group
    for number, run in enumerate(runs):
        if number == len(runs) - 1:
            Accelerator.end_training = end_training  # type: ignore[method-assign]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        _stop_after(run["stop_after"])
        expected = 0 if run["stop_after"] is None else Stopped(signal.SIGTERM, 0).status
        status = train(run["arguments"])
        if status != expected:
            return status or 70
    return 0


def _stop_after(steps: int | None) -> None:
    def after_step(self: Checkpointer) -> None:
        if self.state.step == steps and self.accelerator.is_main_process:
            signal.raise_signal(signal.SIGTERM)
        _after_step(self)

    Checkpointer.after_step = after_step  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(run_all(read_json(sys.argv[1])))
