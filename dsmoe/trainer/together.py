"""Work that the main process does for all."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dsmoe.errors import UserError

_Result = TypeVar("_Result")


def on_main(accelerator: Accelerator, function: Callable[[], _Result]) -> _Result:
    """Call a function in the main process; its result is every process's, and so is its UserError.

    Without that the others would wait for a process that has ended.

    Args:
        accelerator: of the run.
        function: what to do; its result is small.

    Raises:
        UserError: as raised by the function.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
