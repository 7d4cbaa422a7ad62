"""The choice of a strategy."""

from accelerate import Accelerator

from dsmoe.trainer.parallel import Replicated
from dsmoe.trainer.sharded import Sharded
from dsmoe.trainer.zero import Zero


def strategy(accelerator: Accelerator, sharding: str, precision: str) -> Replicated:
    """The strategy that `train.sharding` names; a single process has nothing to share.

    Args:
        accelerator: of the run; for ZeRO one that `dsmoe.trainer.launch.start` made.
        sharding: "none", "fsdp2", "zero2" or "zero3".
        precision: "f32" or "bf16" (autocast).
    """
    if accelerator.num_processes == 1 or sharding == "none":
        return Replicated(accelerator)
    return (Sharded if sharding == "fsdp2" else Zero)(accelerator, precision)
