"""What differs between two nested settings, for warnings on resume."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dsmoe.config.run import RunConfig

# these may change between a run and its resumption without touching its numbers
HARMLESS = frozenset(
    f"train.{name}"
    for name in (
        "output_dir", "resume", "overwrite", "seeds", "num_processes", "log_every_steps", "save_every_minutes",
        "save_every_steps", "keep_last", "trackers", "eval_every_tokens", "micro_batch_size", "num_threads", "sharding",
    )
) | {"data.path", "name", "guard.max_consecutive", "guard.max_total", "mask_phase.dense_stage"}  # fmt: skip

# these say which sample a step reads: a run that went on with others would read text twice or not at all
POSITION = ("train.global_batch_size", "data.sequence_length", "data.order_seed", "data.weights", "data.first_sample",
            "data.unique_fraction")  # fmt: skip


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two runs' settings and may change their numbers, as `differences` has it."""
    harmless = HARMLESS
    if "running" in (settings.get("router_loss", {}).get("mi_statistics") for settings in (old, new)):
        # running means move once a micro-batch
        harmless -= {"train.micro_batch_size"}
    return differences(old, new, harmless)


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A run's saved settings, with the defaults of those that have been added to the code since."""
    return {
        name: {**default, **settings.get(name, {})}
        if isinstance(default, dict)
        else settings.get(name, default)
        for name, default in asdict(RunConfig()).items()
    }


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: frozenset[str] = frozenset()
) -> list[str]:
    """One "name was A and is B" for each leaf that differs, names dotted."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    return [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if name not in ignore and before.get(name) != after.get(name)
    ]


def _leaves(value: Mapping[str, Any], prefix: str = ""):
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item
