"""A model and its tokenizer, from a local folder or the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import dsmoe.model  # noqa: F401 (registers model_type "dsmoe" with the Auto classes)
from dsmoe.environment import default_device
from dsmoe.errors import UserError
from dsmoe.evaluation.quiet import quiet_loading

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready for scoring.

    Args:
        path: the folder or Hub id that it came from.
        model: in evaluation mode, on its device.
        tokenizer: its tokenizer.
    """

    path: str
    model: Any
    tokenizer: Any


def check_path(path: str) -> None:
    """Complain about a path that can be neither a model's folder nor a Hub id ("name" or "owner/name").

    Raises:
        UserError: no such folder, or one without config.json.
    """
    if Path(path).is_dir():
        if not (Path(path) / "config.json").exists():
            raise UserError(f"{path}: has no config.json, so it is not a model's folder")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such folder")


def load_model(
    path: str | Path, *, device: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model as the `lm_eval --model hf` command does.

    Args:
        path: a local folder or a Hub id.
        device: where to put it; None: `default_device()`.
        dtype: one of `DTYPES`; "auto" takes the checkpoint's.
        trust_remote_code: let transformers run code that lies in the folder.

    Raises:
        UserError: it cannot be loaded, for a reason that lies in the folder, the id or the options.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    path = str(path)
    check_path(path)
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
            # not .to(dtype) on a live model: that would also round the rotary frequencies
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: cannot be loaded as a causal language model: {reason}") from error
    try:
        model = model.to(device or default_device())
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return LoadedModel(path, model.eval(), tokenizer)
