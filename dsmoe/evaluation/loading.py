"""A model and its tokenizer, from a local folder or the Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import dsmoe.model  # noqa: F401 (registers model_type "dsmoe" with the Auto classes)
from dsmoe.checkpoint.pretrained import check_weights, final_of_run
from dsmoe.environment import default_device
from dsmoe.errors import UserError, reason_of
from dsmoe.evaluation.quiet import quiet_loading
from dsmoe.files import read_json

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


def model_path(path: str) -> str:
    """Where a model is: the folder itself, `final/` of the folder of a run, or a Hub id ("name" or "owner/name").

    Raises:
        UserError: no such folder, or one without config.json.
    """
    if Path(path).is_dir():
        folder = final_of_run(Path(path))
        if not (folder / "config.json").exists():
            raise UserError(f"{path}: has no config.json, so it is not a model's folder")
        # as given where it can be: results name it so, and --resume knows it by that
        return path if folder == Path(path) else str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"{path}: no such folder")
    return path


def trained_length(path: str) -> int | None:
    """Tokens of a sequence that a model was trained on, where its folder is that of a run or `final/` of one; or None."""
    summary = final_of_run(Path(path)).parent / "summary.json"
    if not summary.is_file():
        return None
    found = read_json(summary).get("config", {}).get("data", {}).get("sequence_length")
    return found if isinstance(found, int) else None


def load_model(
    path: str | Path, *, device: str | None = None, dtype: str = "float32", trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model as the `lm_eval --model hf` command does.

    Args:
        path: a local folder (of a model, or of a run, whose `final/` is taken) or a Hub id.
        device: where to put it; None: `default_device()`.
        dtype: one of `DTYPES`; "auto" takes the checkpoint's.
        trust_remote_code: let transformers run code that lies in the folder.

    Raises:
        UserError: it cannot be loaded, for a reason that lies in the folder, the id or the options, or its weights
            don't fit its config.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    path = model_path(str(path))
    try:
        with quiet_loading():
            # by itself first: what is wrong with it, the tokenizer's loading passes over with a warning
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            tokenizer = _tokenizer(path, trust_remote_code)
            # not .to(dtype) on a live model: that would also round the rotary frequencies
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
            )
            model, loading = loaded
    except StrictDataclassError as error:
        # its own first line says only that something is wrong with the field
        raise UserError(f"{path}: config.json: {error.__cause__ or error}") from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be loaded as a causal language model: {reason}") from error
    # a model of another origin may carry more than its architecture reads, such as heads for other tasks
    check_weights(path, loading, unexpected=model.config.model_type == "dsmoe")
    try:
        model = model.to(device or default_device())
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from error
    return LoadedModel(path, model.eval(), tokenizer)


def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    # transformers and tokenizers raise many kinds for files that are missing or damaged
    except Exception as error:
        raise ValueError(f"its tokenizer can't be read ({reason_of(error)})") from error
