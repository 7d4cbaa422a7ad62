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

from collections.abc import Callable
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
from dsmoe.checkpoint.pretrained import let_others_read, load_pretrained, write_pretrained
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
    weights: dict[str, Tensor] | None = None,
    moments: dict[str, Tensor] | None = None,
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
        weights: the whole weights, where the model holds only a part of them.
        moments: the whole tensors of the optimiser (see `optimizer_tensors`), likewise.

    Returns:
        The new folder.

    Raises:
        UserError: the disk is full; nothing of the new checkpoint is left, and the older ones are all there.
    """
    path = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    with told_when_full(path):
        with new_folder(path, overwrite=True) as beside:
            write_pretrained(model, beside, tokenizer_dir, weights=weights)
            save_file(
                optimizer_tensors(optimizer) if moments is None else moments, beside / "optimizer.safetensors"
            )
            save_file(extra, beside / "extra.safetensors")
            write_json(beside / "state.json", state)
            let_others_read(beside, beside / "state.json")
            write_manifest(beside)
        point_to(path)
    keep_newest(run_dir, path, keep_last)
    return path


def load_checkpoint(
    path: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    load_weights: Callable[[Any, dict[str, Tensor]], Any] | None = None,
    part: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore a model and its optimiser in place, from a checkpoint that `newest_intact` has verified.

    Args:
        path: its folder.
        model: unwrapped model.
        optimizer: its groups hold "names" beside "params".
        load_weights: gives the model whole weights; None: `load_state_dict`.
        part: what this process keeps of a whole tensor of a parameter's optimiser state; None: all of it.

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
        if load_weights is None:
            model.load_state_dict(restored.state_dict())
        else:
            load_weights(model, restored.state_dict())
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
                if part is None
                else part(value, parameter)
                for key, value in tensors.items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
    return read_json(path / "state.json"), extra


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, whole: Callable[[Any], Tensor] = torch.as_tensor
) -> dict[str, Tensor]:
    """The state of an optimiser by "<parameter>.<state>"; `whole` gathers a tensor from all processes."""
    tensors = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"]):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = whole(value).contiguous()
    return tensors
