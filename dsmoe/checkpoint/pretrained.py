"""A model folder that transformers loads: weights, config, tokenizer and a shim for stock tools."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dsmoe.files import new_folder, read_json, write_json, write_text

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
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


def write_pretrained(model: PreTrainedModel, folder: Path, tokenizer_dir: Path | None, *, shim: bool = True) -> None:
    """Write a model into an existing folder.

    Args:
        model: what to save; its config goes along.
        folder: where; the caller makes it appear whole.
        tokenizer_dir: folder whose tokenizer files are copied; None: no tokenizer.
        shim: write the auto_map shim (for model_type "dsmoe").
    """
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
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
    model: PreTrainedModel, folder: str | Path, tokenizer_dir: Path | None, *, overwrite: bool = False
) -> None:
    """Write a model folder that appears whole.

    Raises:
        UserError: the folder is not empty and `overwrite` is false.
    """
    with new_folder(folder, overwrite=overwrite) as beside:
        write_pretrained(model, beside, tokenizer_dir)
