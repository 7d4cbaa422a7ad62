"""Dense models of transformers (Llama, Mistral, Qwen3) as dense twins of this project's architecture."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from dsmoe.checkpoint.pretrained import check_weights, load_pretrained
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError, reason_of
from dsmoe.export.check import EXACT, check_tokens, compare, outputs_of
from dsmoe.files import read_json
from dsmoe.model import DSMoEForCausalLM

# and how their queries and keys are normalised
QK_NORMS = {"llama": "none", "mistral": "none", "qwen3": "per_head"}


def load_dense(path: str | Path) -> tuple[DSMoEForCausalLM, Path, torch.dtype]:
    """Load a dense model, this project's or one of transformers, in float32.

    Args:
        path: model folder, or folder of a finished run.

    Returns:
        The model in evaluation mode, its folder, and the dtype that its config names (float32 where it names none).

    Raises:
        UserError: no model there, or one that is not of this architecture; the message says in what.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"{path}: no such folder; download a model of the Hub with `hf download NAME --local-dir DIR`"
        )
    file = folder / "config.json"
    content = read_json(file) if file.exists() else {}
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind in QK_NORMS:
        return _checked_twin(folder), folder, _dtype(content)
    # the config.json of a run's folder is that of the run; the model is in final/
    if kind not in (None, DSMoEConfig.model_type) and not (folder / "final").is_dir():
        raise UserError(
            f"{path}: model_type is {kind!r}; a dense model is needed, of dsmoe, {', '.join(QK_NORMS)}"
        )
    model, folder = load_pretrained(folder, torch.float32)
    return model, folder, _dtype(read_json(folder / "config.json"))


# files that are damaged or missing, entries of config.json of the wrong kind ("dtype": "foo"), or a quantisation whose
# package isn't installed
_UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, ImportError,
               StrictDataclassError)  # fmt: skip


def _checked_twin(folder: Path) -> DSMoEForCausalLM:
    """The twin of a stock model, after both gave the same logits on random tokens."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except _UNREADABLE as error:
        raise UserError(f"{folder / 'config.json'}: can't be read ({reason_of(error)})") from None
    _check_architecture(config, str(folder))
    stock = _load_stock(folder)
    model = twin_of(stock)
    tokens_BS = check_tokens(config.vocab_size, config.max_position_embeddings)
    agreement = compare(outputs_of(stock, tokens_BS), outputs_of(model, tokens_BS), None)
    if not agreement.max_relative_difference <= EXACT.largest:
        raise UserError(
            f"{folder}: as a dsmoe model it gives other logits (relative difference "
            f"{agreement.max_relative_difference:.1e}); its config.json must ask for something that is not known here"
        )
    return model


@torch.no_grad()
def twin_of(stock: Any) -> DSMoEForCausalLM:
    """The same function in this project's architecture; all weights but those of the MLPs are shared.

    Args:
        stock: one of transformers' models named in QK_NORMS.
    """
    weights: dict[str, Tensor] = {}
    for name, value in stock.state_dict().items():
        if ".mlp." not in name:
            weights[name] = value
    for index, layer in enumerate(stock.model.layers):
        mlp, place = layer.mlp, f"model.layers.{index}.mlp.experts"
        weights[f"{place}.gate_up_proj"] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])[None]
        weights[f"{place}.down_proj"] = mlp.down_proj.weight.T[None].contiguous()
    with torch.device("meta"):
        model = DSMoEForCausalLM(twin_config(stock.config))
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.generation_config = stock.generation_config
    return model.eval()


def twin_config(config: PreTrainedConfig) -> DSMoEConfig:
    """The dense twin's configuration of one of transformers' models named in QK_NORMS."""
    given: Any = config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "initializer_range",
             "tie_word_embeddings", "bos_token_id", "pad_token_id")  # fmt: skip
    # Llama 3 names several ends of a text; the first is that of documents
    eos = given.eos_token_id[0] if isinstance(given.eos_token_id, list) else given.eos_token_id
    return DSMoEConfig(
        kind="dense", num_experts=1, qk_norm=QK_NORMS[given.model_type], eos_token_id=eos,
        rope_parameters={"rope_type": "default", "rope_theta": float(given.rope_parameters["rope_theta"])},
        **{name: getattr(given, name) for name in names},
    )  # fmt: skip


def _check_architecture(config: Any, path: str) -> None:
    rope = config.rope_parameters or {}
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= config.max_position_embeddings:
        window = None  # it leaves nothing out
    for what, value, wanted in (
        ("hidden_act", config.hidden_act, "silu"),
        ("attention_bias", getattr(config, "attention_bias", False), False),
        ("mlp_bias", getattr(config, "mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0),
        ("sliding_window", window, None),
    ):
        if value != wanted:
            raise UserError(f"{path}: {what} is {value!r}; this architecture knows {wanted!r} alone")


def _load_stock(folder: Path) -> Any:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        # of tensors of another shape the refusal below tells more than transformers' own
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except _UNREADABLE as error:
        raise UserError(f"{folder}: the model can't be read ({reason_of(error)})") from None
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model, loading = loaded
    # weights that it has no place for too: biases, say, that config.json doesn't speak of
    check_weights(folder, loading)
    return model.eval()


def _dtype(content: dict[str, Any]) -> torch.dtype:
    name = content.get("dtype") or content.get("torch_dtype")
    found = getattr(torch, str(name), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32
