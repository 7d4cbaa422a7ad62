"""A model folder that transformers loads: weights, config, tokenizer and a shim for stock tools."""

import shutil
from collections.abc import Mapping
from contextlib import suppress
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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

# what transformers and torch raise at entries of config.json that are of the wrong kind, such as "dtype": "foo"
_BAD_CONFIG = (ValueError, TypeError, KeyError, AttributeError)


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
    let_others_read(folder, folder / "config.json")
    if shim:
        write_text(folder / SHIM_NAME, SHIM)
        config = read_json(folder / "config.json")
        write_json(folder / "config.json", {**config, "auto_map": AUTO_MAP})
    if tokenizer_dir is not None:
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                shutil.copy(tokenizer_dir / name, folder / name)


def let_others_read(folder: Path, like: Path) -> None:
    """Give a folder's weights the mode of the file `like`, which follows the umask.

    safetensors makes its files readable by their owner alone. The umask itself can't be read without changing it for
    all threads.
    """
    for weights in folder.glob("*.safetensors"):
        with suppress(OSError):  # a file system that has no modes
            shutil.copymode(like, weights)


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
    folder = final_of_run(Path(path))
    if not (folder / "config.json").exists():
        raise UserError(f"{path}: no model folder (config.json is missing)")
    found = _model_type(folder)
    if found != DSMoEConfig.model_type:
        raise UserError(f"{folder}: model_type is {found!r}; a 'dsmoe' model is needed")
    return folder


def read_config(path: str | Path) -> DSMoEConfig:
    """The configuration of a dsmoe model, from a model folder or a run's folder (its `final/`).

    Raises:
        UserError: no model there, one of another architecture, or a config.json that is none.
    """
    folder = model_folder(path)
    try:
        return DSMoEConfig.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from None
    except (OSError, *_BAD_CONFIG) as error:
        raise UserError(f"{folder / 'config.json'}: can't be read ({_reason(error)})") from None


def final_of_run(folder: Path) -> Path:
    """`final/` of the folder of a run, which has no model of its own; any other folder itself."""
    final = folder / "final"
    # the folder of a run may hold a config.json, which is the run's
    if (final / "config.json").exists() and _model_type(folder) is None:
        return final
    return folder


def _model_type(folder: Path) -> Any:
    """What config.json says; None: no such file, or not a model's."""
    if not (folder / "config.json").exists():
        return None
    config = read_json(folder / "config.json")
    return config.get("model_type") if isinstance(config, dict) else None


def stored_dtype(folder: Path) -> str:
    """The dtype that a model folder's config.json names, one of DTYPES; "float32" where it names another or none."""
    dtype = read_json(folder / "config.json").get("dtype")
    return dtype if dtype in DTYPES else "float32"


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
    except (OSError, SafetensorError, RuntimeError, *_BAD_CONFIG) as error:
        raise UserError(f"{folder}: the model can't be read ({_reason(error)})") from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    check_weights(folder, loading)
    return model.eval(), folder


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def check_weights(path: str | Path, loading: Mapping[str, Any], *, unexpected: bool = True) -> None:
    """Refuse weights that don't fit the model: transformers only warns, and draws what is missing at random.

    Args:
        path: the model's folder or Hub id.
        loading: the loading info of `from_pretrained`; it counts no tied weight as missing.
        unexpected: refuse weights that the model has no place for, too.

    Raises:
        UserError: they don't fit.
    """
    for problem in ("missing_keys", "mismatched_keys", *(["unexpected_keys"] if unexpected else [])):
        if loading.get(problem):
            name = sorted(map(str, loading[problem]))[0]
            raise UserError(
                f"{path}: the weights don't fit config.json ({problem.replace('_', ' ')}: {name} ...)"
            )
