"""A model folder that transformers loads: weights, config, tokenizer and a shim for stock tools."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dsmoe.config import DSMoEConfig
from dsmoe.environment import tell_deepspeed
from dsmoe.errors import UserError
from dsmoe.files import new_folder, read_json, write_json, write_text
from dsmoe.model import DSMoEForCausalLM

SHIM_NAME = "dsmoe_shim.py"
SHIM = '''"""Lets stock tools load this folder with trust_remote_code=True; the code itself is the installed `dsmoe`."""

from dsmoe import DSMoEConfig, DSMoEForCausalLM, DSMoEModel

__all__ = ["DSMoEConfig", "DSMoEForCausalLM", "DSMoEModel"]
'''
AUTO_MAP = {
    "AutoConfig": "dsmoe_shim.DSMoEConfig",
    "AutoModel": "dsmoe_shim.DSMoEModel",
    "AutoModelForCausalLM": "dsmoe_shim.DSMoEForCausalLM",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)


def write_pretrained(
    model: PreTrainedModel,
    folder: Path,
    tokenizer_dir: Path | None,
    *,
    shim: bool = True,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model into an existing folder.

    Args:
        model: what to save; its config goes along.
        folder: where; the caller makes it appear whole.
        tokenizer_dir: folder whose tokenizer files are copied; None: no tokenizer.
        shim: write the auto_map shim (for model_type "dsmoe").
        weights: the whole weights, where the model holds only a part of them.
    """
    tell_deepspeed()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder, state_dict=weights)
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if shim:
        write_text(folder / SHIM_NAME, SHIM)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "auto_map": AUTO_MAP})
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                shutil.copy(tokenizer_dir / name, folder / name)


def save_pretrained(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer_dir: Path | None,
    *,
    overwrite: bool = False,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder that appears whole.

    Raises:
        UserError: the folder is not empty and `overwrite` is false.
    """
    with new_folder(folder, overwrite=overwrite) as beside:
        write_pretrained(model, beside, tokenizer_dir, weights=weights)


def model_folder(path: str | Path) -> Path:
    """The folder of a dsmoe model: the path itself, or `final/` of the folder of a run.

    Raises:
        UserError: no model there, or one of another architecture.
    """
    folder = Path(path)
    if not (folder / "config.json").exists() and (folder / "final" / "config.json").exists():
        folder = folder / "final"
    if not (folder / "config.json").exists():
        raise UserError(f"{path}: no model folder (config.json is missing)")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") != DSMoEConfig.model_type:
        found = config.get("model_type") if isinstance(config, dict) else None
        # the folder of a run holds a config.json of the run, and the model in final/
        if (folder / "final").is_dir():
            return model_folder(folder / "final")
        raise UserError(f"{folder}: model_type is {found!r}; a 'dsmoe' model is needed")
    return folder


def load_pretrained(path: str | Path, dtype: torch.dtype) -> tuple[DSMoEForCausalLM, Path]:
    """Load a dsmoe model from a model folder, or from a run's folder (its `final/`).

    Args:
        path: the folder.
        dtype: of the weights.

    Returns:
        The model in evaluation mode, and the folder that it came from.

    Raises:
        UserError: no model there, one of another architecture, or a damaged file.
    """
    folder = model_folder(path)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # of tensors of another shape the refusal below tells more than transformers' own
        loaded: Any = DSMoEForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, loading = loaded
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: the model can't be read ({str(error).splitlines()[0]})") from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    # transformers only warns, and draws what is missing at random
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading.get(problem):
            name = sorted(map(str, loading[problem]))[0]
            raise UserError(
                f"{folder}: the weights don't fit config.json ({problem.replace('_', ' ')}: {name} ...)"
            )
    return model.eval(), folder
