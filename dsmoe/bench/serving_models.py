"""The models of the serving benchmark, and the form of each that an engine gets.

Three of one shape, with random weights: speed depends on weights only through the choice of experts, and routers with
a wide distribution of weights make that as diverse as in a trained, balanced model.

| model | MLP                                                                              |
|-------|----------------------------------------------------------------------------------|
| dense | one of width F                                                                   |
| dsmoe | N experts of width F / N, K of them kept: the dense twin's parameters in total   |
| smoe  | more experts of that width, K of them kept: about 2.5 times the parameters       |

qk_norm is "none", so that stock engines take the dense twin as a real Llama, which is its fastest form in all of them.

| engine       | dense        | smoe, dsmoe                                   |
|--------------|--------------|-----------------------------------------------|
| own          | native       | native                                        |
| vllm         | Llama        | native, through the plugin (`dsmoe.serving`)  |
| transformers | Llama        | Qwen2-MoE                                     |
| llamacpp     | Llama (GGUF) | Qwen2-MoE (GGUF)                              |
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dsmoe import __version__
from dsmoe.accounting import count_parameters, kv_cache_bytes, total_parameters
from dsmoe.bench.inference_model import FULL_MODEL
from dsmoe.checkpoint.pretrained import save_pretrained
from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.export.write import export
from dsmoe.model import DSMoEForCausalLM

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
KINDS = ("dense", "smoe", "dsmoe")
SMOE_FACTOR = 2.5
_SEED = 0


@dataclass(frozen=True)
class Shape:
    """What the three models share.

    Attributes:
        sizes: fields of DSMoEConfig.
        num_experts: N of the DS-MoE.
        k: experts that a token keeps.
    """

    num_experts: int
    k: int
    sizes: Mapping[str, Any] = field(default_factory=dict)


# router logits of a standard deviation of about 1.4 (0.05 * sqrt(768)), and gates that keep the size of a layer's output:
# sharper or larger ones amplify rounding, and the exports are checked against the original
_GATE_SCALE = 4.0  # a power of two: it is folded into bfloat16 weights
_COMMON = {"qk_norm": "none", "gate_normalization": "softmax", "router_initializer_range": 0.05}
FULL_SHAPE = Shape(
    num_experts=16,
    k=4,
    sizes={**FULL_MODEL.sizes, "max_position_embeddings": 4096, **_COMMON},
)
QUICK_SHAPE = Shape(
    num_experts=4,
    k=1,
    sizes={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # vLLM on CPU takes no heads narrower than 32
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        **_COMMON,
    },
)


@dataclass(frozen=True)
class Form:
    """A model as an engine gets it.

    Attributes:
        source: folder, file or Hub id.
        native: whether it is a dsmoe folder.
        model_bytes: of the weights.
        kv_bytes_per_token: keys and values of one token, in the dtype of the weights (float16 counts as bfloat16).
        vocab_size: prompts are drawn from it.
        num_params_total: all parameters.
        num_params_active: those that one token uses, the whole embedding included; None: not known beforehand.
    """

    source: str
    native: bool
    model_bytes: int
    kv_bytes_per_token: int
    vocab_size: int
    num_params_total: int
    num_params_active: int | None


def config_of(shape: Shape, kind: str) -> DSMoEConfig:
    """The configuration of one of the three models."""
    if kind == "dense":
        return DSMoEConfig(**shape.sizes, kind="dense", num_experts=1)
    experts = shape.num_experts if kind == "dsmoe" else smoe_experts(shape)
    sizes = {**shape.sizes, "mlp_gate_scale": _GATE_SCALE}
    sizes["intermediate_size"] = shape.sizes["intermediate_size"] // shape.num_experts * experts
    return DSMoEConfig(**sizes, kind=kind, num_experts=experts, mlp_routing={"policy": "top_k", "k": shape.k})


def smoe_experts(shape: Shape) -> int:
    """The number of experts with which the SMoE comes nearest to SMOE_FACTOR times the dense twin's parameters."""
    counts = count_parameters(config_of(shape, "dense"))
    one = counts.mlp / shape.num_experts + shape.sizes["num_hidden_layers"] * shape.sizes["hidden_size"]
    return round((SMOE_FACTOR * counts.total - (counts.total - counts.mlp)) / one)


def native_folder(shape: Shape, kind: str, dtype: str, cache: Path) -> Path:
    """One of the three models in our own form, made if the cache folder hasn't got it yet."""
    config = config_of(shape, kind)
    key = json.dumps([config.to_diff_dict(), dtype, _SEED, __version__], sort_keys=True, default=str)
    folder = cache / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
    if not (folder / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            model: Any = DSMoEForCausalLM(config)
        save_pretrained(model.to(DTYPES[dtype]), folder, None, overwrite=True)
    return folder


def form_of(folder: Path, engine: str, dtype: str, cache: Path, stock: bool = True) -> Form:
    """A dsmoe folder in the form for an engine, exported if the cache hasn't got it yet.

    Args:
        folder: a dsmoe model folder.
        engine: one of `dsmoe.bench.serving_engines.ENGINES`.
        dtype: of the weights.
        cache: where exports are kept.
        stock: give vllm and transformers stock architectures as the table above says; False: the folder itself.

    Raises:
        UserError: llama.cpp can't hold the model.
    """
    config = DSMoEConfig.from_pretrained(folder)
    source, native = folder, True
    target = _target(engine, config.num_experts) if stock or engine == "llamacpp" else None
    if target is not None:
        suffix = ".gguf" if target == "gguf" else ""
        source, native = cache / f"{_name(folder)}-{target}-{dtype}{suffix}", False
        if not source.exists():
            export(folder, target, source, dtype, tokenizer=target != "gguf")
    return Form(
        source=str(source),
        native=native,
        # a native folder is stored in another type, maybe, than engines run it in
        model_bytes=total_parameters(config) * DTYPES[dtype].itemsize if native else stored_bytes(source),
        kv_bytes_per_token=kv_cache_bytes(config, 1, 1, dtype),
        vocab_size=config.vocab_size,
        num_params_total=total_parameters(config),
        num_params_active=_active(config),
    )


def _target(engine: str, num_experts: int) -> str | None:
    """The export format for an engine; None: the native folder."""
    if engine == "llamacpp":
        return "gguf"
    if num_experts == 1 and engine in ("vllm", "transformers"):
        return "llama"
    return "qwen2moe" if engine == "transformers" else None


def _name(folder: Path) -> str:
    """A name for exports of a folder: another one for another place or other contents."""
    stat = (folder / "config.json").stat()
    key = f"{folder.resolve()} {stat.st_mtime_ns}"
    return f"{folder.name}-{hashlib.sha256(key.encode()).hexdigest()[:6]}"


def _active(config: DSMoEConfig) -> int | None:
    """Parameters that a token uses; None where that depends on the token (thresholds)."""
    try:
        return count_parameters(config).active
    except UserError:
        return None


def stored_bytes(source: Path) -> int:
    """Bytes of weights: of a file, or of the safetensors files of a folder."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    return sum(path.stat().st_size for path in files)
