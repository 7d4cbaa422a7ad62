"""DeepSpeed's settings, made from those of the run, and what a launcher says about sharding.

The user configures the run alone; `accelerate launch` with `distributed_type: DEEPSPEED` adds the stage. What else such a
launch configuration may hold is in the run's settings (clipping, precision, accumulation) or refused (offloading, a
DeepSpeed file), never passed over silently.
"""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from accelerate import DeepSpeedPlugin

from dsmoe.config.run import RunConfig, TrainSettings
from dsmoe.errors import UserError

STAGES = {"zero2": 2, "zero3": 3}
# what accelerate would read by itself, once the launcher's wishes are settled
_OURS = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
)


def settle_sharding(train: TrainSettings) -> None:
    """Let the launcher's stage decide where the run says nothing.

    Args:
        train: `sharding` is replaced.

    Raises:
        UserError: they contradict each other, or the launcher asks for what this trainer doesn't do.
    """
    if flag("ACCELERATE_USE_FSDP"):
        raise UserError(
            "the launch configuration has distributed_type FSDP, which this trainer does without accelerate; use "
            "MULTI_GPU and --train.sharding fsdp2"
        )
    if not flag("ACCELERATE_USE_DEEPSPEED"):
        return
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise UserError(
            f"the launch configuration names deepspeed_config_file {os.environ['ACCELERATE_DEEPSPEED_CONFIG_FILE']}; "
            "DeepSpeed's settings come from the run: give deepspeed_config with zero_stage instead"
        )
    for what in ("OPTIMIZER", "PARAM"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none")
        if device != "none":
            raise UserError(
                f"the launch configuration has offload_{what.lower()}_device {device}; offloading isn't supported: none"
            )
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise UserError(f"the launch configuration has zero_stage {stage}; it must be 2 or 3")
    asked: Literal["zero2", "zero3"] = "zero2" if stage == "2" else "zero3"
    if train.sharding not in ("none", asked):
        raise UserError(
            f"train.sharding is {train.sharding}, but the launch configuration asks for DeepSpeed's stage {stage}; leave "
            f"train.sharding out, or launch with distributed_type "
            + (
                f"DEEPSPEED and zero_stage {STAGES[train.sharding]}"
                if train.sharding in STAGES
                else "MULTI_GPU"
            )
        )
    train.sharding = asked


def flag(name: str) -> bool:
    """Whether a launcher has set the environment variable to true."""
    return os.environ.get(name, "false").lower() == "true"


@contextmanager
def launcher_set_aside() -> Iterator[None]:
    """Hide from accelerate what a launcher says about DeepSpeed and torch.compile; it is settled.

    Accumulation is the trainer's.
    """
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name in _OURS or name.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_DYNAMO_"))
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # accelerate sets it itself
        os.environ.update(hidden)


def zero_plugin(config: RunConfig, num_processes: int, on_cpu: bool) -> DeepSpeedPlugin:
    """DeepSpeed for a run whose `train.sharding` is "zero2" or "zero3".

    Args:
        config: of the run.
        num_processes: how many share the model.
        on_cpu: without a GPU.

    Raises:
        UserError: DeepSpeed isn't installed.
    """
    _import_deepspeed(on_cpu)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "train_batch_size": config.train.micro_batch_size * num_processes,
        # the trainer accumulates, and marks the last micro-batch
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": {"stage": STAGES[config.train.sharding]},
        # AdamW is ours
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    # weights are drawn whole, so that they are those of any other strategy
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)


def keep_from_transformers() -> None:
    """Tell transformers nothing of ZeRO-3, which it has from accelerate: it would shard every model that is loaded."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _import_deepspeed(on_cpu: bool) -> None:
    """Import DeepSpeed; on CPU it must be kept from building its shared-memory operator."""
    try:
        ops = importlib.import_module("deepspeed.ops")
    except ImportError as error:
        raise UserError(
            f"train.sharding zero2 and zero3 need DeepSpeed ({error}); pip install deepspeed"
        ) from None
    # torch has renamed collectives that DeepSpeed calls
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if on_cpu:
        # a build that is killed leaves a lock on which every later run hangs
        for name in ("deepspeed_shm_comm", "shm_comm"):
            getattr(ops, "__compatible_ops__")[name] = False  # noqa: B009 (a name that classes would mangle)
