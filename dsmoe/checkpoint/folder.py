"""Training checkpoints: `checkpoints/step-00001000/` with model, optimiser and loop state.

| file                  | holds                                                                        |
|-----------------------|------------------------------------------------------------------------------|
| model.safetensors ... | the model as transformers loads it                                           |
| optimizer.safetensors | "<parameter>.<state>" of AdamW                                               |
| extra.safetensors     | tensors of the loop: running p(e), torch's random state                      |
| state.json            | step, samples consumed, controller and the environment that wrote it         |

A folder is written beside its place and renamed, so that one with the right name is whole.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dsmoe.checkpoint.pretrained import load_pretrained, write_pretrained
from dsmoe.errors import UserError
from dsmoe.files import new_folder, read_json, write_json

_NAME = re.compile(r"step-(\d{8})$")


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.match(path.name) and path.is_dir())


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    folders = checkpoint_folders(run_dir)
    return folders[-1] if folders else None


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    extra: dict[str, Tensor],
    tokenizer_dir: Path | None,
    keep_last: int,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep_last`.

    Args:
        run_dir: folder of the run.
        model: unwrapped model.
        optimizer: its groups hold "names" beside "params".
        state: JSON-able state of the loop; has "step".
        extra: tensors of the loop.
        tokenizer_dir: copied along.
        keep_last: how many to keep (at least 1).

    Returns:
        The new folder.
    """
    path = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    with new_folder(path, overwrite=True) as beside:
        write_pretrained(model, beside, tokenizer_dir)
        save_file(_optimizer_tensors(optimizer), beside / "optimizer.safetensors")
        save_file(extra, beside / "extra.safetensors")
        write_json(beside / "state.json", state)
    for old in checkpoint_folders(run_dir)[:-keep_last]:
        shutil.rmtree(old)
    return path


def load_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore a model and its optimiser in place.

    Returns:
        The loop's state and its tensors.

    Raises:
        UserError: a file is missing or damaged, or doesn't fit the model.
    """
    try:
        restored, _ = load_pretrained(path, torch.float32)
        tensors = load_file(path / "optimizer.safetensors")
        extra = load_file(path / "extra.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: checkpoint can't be read ({error})") from None
    try:
        model.load_state_dict(restored.state_dict())
    except RuntimeError as error:
        raise UserError(
            f"{path}: checkpoint of another model ({str(error).splitlines()[-1].strip()})"
        ) from None
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            prefix = f"{name}."
            optimizer.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
    return read_json(path / "state.json"), extra


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = torch.as_tensor(value).contiguous()
    return tensors
