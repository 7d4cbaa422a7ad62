"""Training checkpoints: `checkpoints/step-00001000/` with model, optimiser and loop state.

| file                  | holds                                                                        |
|-----------------------|------------------------------------------------------------------------------|
| model.safetensors ... | the model as transformers loads it                                           |
| optimizer.safetensors | "<parameter>.<state>" of AdamW                                               |
| extra.safetensors     | tensors of the loop: running p(e), random states                             |
| state.json            | step, samples consumed, controller, guard and the environment that wrote it  |
| manifest.json         | size and SHA-256 of each of the others                                       |

A folder is written beside its place, brought to the disk and renamed. Then `checkpoints/latest.json` names it, and only
then are older ones deleted.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from dsmoe.checkpoint.diskfull import told_when_full
from dsmoe.checkpoint.manifest import write_manifest
from dsmoe.checkpoint.newest import point_to
from dsmoe.checkpoint.pretrained import load_pretrained, write_pretrained
from dsmoe.checkpoint.retention import keep_newest
from dsmoe.errors import UserError
from dsmoe.files import new_folder, read_json, write_json


def save_checkpoint(
    run_dir: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    extra: dict[str, Tensor],
    tokenizer_dir: Path | None,
    keep_last: int,
) -> Path:
    """Write a checkpoint, then delete all but the newest `keep_last` intact ones.

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

    Raises:
        UserError: the disk is full; nothing of the new checkpoint is left, and the older ones are all there.
    """
    path = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    with told_when_full(path):
        with new_folder(path, overwrite=True) as beside:
            write_pretrained(model, beside, tokenizer_dir)
            save_file(_optimizer_tensors(optimizer), beside / "optimizer.safetensors")
            save_file(extra, beside / "extra.safetensors")
            write_json(beside / "state.json", state)
            write_manifest(beside)
        point_to(path)
    keep_newest(run_dir, path, keep_last)
    return path


def load_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore a model and its optimiser in place, from a checkpoint that `newest_intact` has verified.

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
                # a copy: what safetensors returns is the file, mapped
                key.removeprefix(prefix): value.to(parameter.device, copy=True)
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
