"""The dense stage of a run: its steps before the mask phase, shared by runs that differ in nothing but that phase.

One stage is enough for models of several budgets: with a mask phase of 40% of the steps, four of them take
0.6 + 4 * 0.4 = 2.2 runs instead of four.
"""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsmoe.checkpoint import newest_intact
from dsmoe.config.run import RunConfig
from dsmoe.errors import UserError
from dsmoe.files import read_json
from dsmoe.trainer.differences import changed, with_defaults
from dsmoe.trainer.mask_phase import first_masked_step


def stage_folder(config: RunConfig, seed: int) -> Path | None:
    """Where the stage of a seed is kept; None: the run shares none."""
    shared = config.mask_phase.dense_stage
    return Path(shared) / f"seed-{seed}" if shared else None


def is_last_dense_step(config: RunConfig, step: int) -> bool:
    """Whether the stage ends with so many steps done."""
    return step == first_masked_step(config.mask_phase.fraction, config.total_steps)


def find_stage(config: RunConfig, seed: int, corpus: str) -> Path | None:
    """The checkpoint that a fresh run starts from instead of step 0; None: the stage must be trained first.

    Args:
        config: of the run.
        seed: of the run.
        corpus: fingerprint of its text.

    Raises:
        UserError: what lies there is damaged, or of another run up to the mask phase.
    """
    folder = stage_folder(config, seed)
    try:
        checkpoint = newest_intact(folder) if folder is not None else None
    except UserError as error:
        # what it advises is for a run's own checkpoints
        found = str(error).partition("; bring one back")[0]
        raise UserError(f"{found}; remove that folder, or name another mask_phase.dense_stage") from None
    if checkpoint is None:
        return None
    record = read_json(checkpoint / "state.json")
    unlike = _unlike(config, seed, corpus, record)
    if unlike:
        raise UserError(
            f"mask_phase.dense_stage {config.mask_phase.dense_stage}: holds the dense stage of another run ({unlike}); "
            "name another folder, or remove it"
        )
    return checkpoint


def take_log(checkpoint: Path, folder: Path) -> None:
    """Give a run that starts from a stage the stage's log.

    Args:
        checkpoint: of `find_stage`.
        folder: of the run.
    """
    log = checkpoint.parents[1] / "log.jsonl"
    if log.exists():
        shutil.copyfile(log, folder / "log.jsonl")


def _unlike(config: RunConfig, seed: int, corpus: str, record: Mapping[str, Any]) -> str | None:
    if record["seed"] != seed:
        return f"its seed is {record['seed']}, here it is {seed}"
    if record["environment"]["corpus"] != corpus:
        return f"it read another token folder than {config.data.path}"
    first = first_masked_step(config.mask_phase.fraction, config.total_steps)
    if record["step"] != first:
        return f"it ends with step {record['step']}, and here the mask phase begins after {first}"
    before, now = with_defaults(record["config"]), asdict(config)
    # what the phase does has no part in the steps before it
    before["mask_phase"] = now["mask_phase"]
    return next(iter(changed(before, now)), None)
