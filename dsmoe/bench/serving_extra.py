"""Further models of the serving benchmark: a dsmoe folder, a transformers folder or Hub id, a GGUF file."""

from pathlib import Path
from typing import Any

import torch

from dsmoe.bench.serving_models import DTYPES, Form, form_of, stored_bytes
from dsmoe.errors import UserError
from dsmoe.files import read_json


def parse_extras(texts: list[str]) -> dict[str, str]:
    """Name to source, of `NAME=SOURCE` words.

    Raises:
        UserError: a word of another form, or a name that is taken.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, source = text.partition("=")
        if not name or not source:
            raise UserError(f"--extra {text!r}: write NAME=HUB_ID_OR_FOLDER")
        if name in found or name in ("dense", "smoe", "dsmoe"):
            raise UserError(f"--extra {text!r}: the name {name!r} is taken; choose another one")
        found[name] = source
    return found


def kind_of(source: str) -> str:
    """ "dense", "smoe" or "dsmoe" of a dsmoe folder, "extra" of everything else."""
    config = _local_config(source)
    return str(config.get("kind", "dsmoe")) if config.get("model_type") == "dsmoe" else "extra"


def extra_form(source: str, engine: str, dtype: str, cache: Path) -> Form:
    """A model in the form for an engine.

    Raises:
        UserError: the engine can't take it, or there is no such model.
    """
    if source.endswith(".gguf"):
        return _gguf_form(Path(source), engine)
    if _local_config(source).get("model_type") == "dsmoe":
        return form_of(Path(source), engine, dtype, cache, stock=False)
    if engine not in ("vllm", "transformers"):
        wanted = {"own": "a dsmoe folder", "llamacpp": "a GGUF file or a dsmoe folder"}[engine]
        raise UserError(f"{source}: {engine} needs {wanted}")
    return _transformers_form(source, dtype)


def _local_config(source: str) -> dict[str, Any]:
    path = Path(source) / "config.json"
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _transformers_form(source: str, dtype: str) -> Form:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{source}: transformers can't load it ({str(error).splitlines()[0]})") from None
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    size = DTYPES[dtype].itemsize
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    number = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    kept = getattr(text, "num_experts_per_tok", None) or number
    return Form(
        source=source,
        native=False,
        model_bytes=total * size,
        kv_bytes_per_token=2 * text.num_hidden_layers * kv_heads * head_dim * size,
        vocab_size=text.vocab_size,
        num_params_total=total,
        num_params_active=total - round(experts * (1 - kept / number)),
    )


def _gguf_form(path: Path, engine: str) -> Form:
    if engine != "llamacpp":
        raise UserError(f"{path}: {engine} takes no GGUF files")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path}: reading it needs the package gguf: pip install gguf") from None
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()

    def value(name: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{architecture}.{name}")
        found = default if field is None else field.contents()
        return max(found) if isinstance(found, list) else found

    heads = value("attention.head_count")
    width = value("attention.key_length") or value("embedding_length") // heads
    total = sum(int(tensor.n_elements) for tensor in reader.tensors)
    experts = sum(int(tensor.n_elements) for tensor in reader.tensors if "_exps" in tensor.name)
    kept, number = value("expert_used_count", 1), value("expert_count", 1)
    table = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    return Form(
        source=str(path),
        native=False,
        model_bytes=stored_bytes(path),
        kv_bytes_per_token=2 * value("block_count") * value("attention.head_count_kv", heads) * width * 2,
        vocab_size=int(table.shape[1]),
        num_params_total=total,
        num_params_active=total - round(experts * (1 - kept / number)) if experts else total,
    )
