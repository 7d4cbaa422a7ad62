"""The engines of `dsmoe serve`: which are installed, and the command line that starts each.

vLLM is started as `python -m vllm.entrypoints.openai.api_server`, since the script `vllm` of the CPU package fails.
transformers' server is started through `dsmoe.serving.transformers_server`, which makes the architecture known to it.
"""

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError

NAMES = ("vllm", "transformers")
INSTALL = {
    "vllm": "pip install 'vllm>=0.32'",
    "transformers": "pip install 'transformers[serving]'",
}
_SERVER_PACKAGES = ("fastapi", "uvicorn", "openai", "pydantic")
_PLUGINS_GROUP = "vllm.general_plugins"
_MEMORY_OPTIONS = ("--kv-cache-memory-bytes", "--gpu-memory-utilization")
_REQUESTS = 64
_BLOCK = 128  # tokens; vLLM's unit of cache on CPU


@dataclass(frozen=True)
class Request:
    """What to serve and where.

    Attributes:
        folder: the model folder.
        host: address to listen at.
        port: its port.
        dtype: "bfloat16" or "float32".
        max_model_len: longest sequence, prompt and answer together; None: the config's.
        cache_bytes: memory for keys and values, where the engine should not choose it itself (vLLM).
        more: arguments for the engine itself.
    """

    folder: Path
    host: str
    port: int
    dtype: str
    max_model_len: int | None = None
    cache_bytes: int | None = None
    more: Sequence[str] = field(default_factory=tuple)


def choose_engine(asked: str) -> str:
    """ "vllm" or "transformers".

    Args:
        asked: "auto" (vLLM where it is installed) or one of NAMES.

    Raises:
        UserError: it isn't installed, or vLLM would not find the plugin.
    """
    missing = {name: _missing(name) for name in NAMES}
    if asked == "auto":
        found = [name for name in NAMES if not missing[name]]
        if not found:
            raise UserError(
                f"no engine is installed: {INSTALL['vllm']} for vLLM, or {INSTALL['transformers']} for the slower "
                f"server of transformers (missing for it: {', '.join(missing['transformers'])})"
            )
        asked = found[0]
    if missing[asked]:
        raise UserError(f"--engine {asked}: {', '.join(missing[asked])} is not installed; {INSTALL[asked]}")
    if asked == "vllm":
        _check_plugin()
    return asked


def command_of(engine: str, request: Request) -> list[str]:
    """The command line of an engine.

    Raises:
        UserError: something asked for that the engine has no option for.
    """
    place = ["--host", request.host, "--port", str(request.port), "--dtype", request.dtype]
    if engine == "vllm":
        length = [] if request.max_model_len is None else ["--max-model-len", str(request.max_model_len)]
        cache = [] if request.cache_bytes is None else ["--kv-cache-memory-bytes", str(request.cache_bytes)]
        module = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        return [*module, "--model", str(request.folder), *place, *length, *cache, *request.more]
    if request.max_model_len is not None:
        raise UserError("--max-model-len is an option of vLLM; transformers' server has none of the kind")
    if "@" in str(request.folder):
        raise UserError(
            f"{request.folder}: transformers' server reads what follows an @ as a revision; rename it"
        )
    module = [sys.executable, "-m", "dsmoe.serving.transformers_server"]
    return [*module, "serve", str(request.folder), *place, *request.more]


def cache_bytes_on_cpu(config: DSMoEConfig, request: Request) -> int | None:
    """Memory for keys and values where vLLM would ask for nearly all there is.

    On CPU its own default is 92% of the machine's memory, and it ends at once where less is free. This is room for
    _REQUESTS requests of the longest length, and at most a quarter of what is free.

    Args:
        config: of the model.
        request: what is served.

    Returns:
        Bytes; None where the choice is vLLM's (on a GPU) or was made by the user.
    """
    import torch

    if torch.accelerator.is_available() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    if any(word.split("=")[0] in _MEMORY_OPTIONS for word in request.more):
        return None
    free = _free_memory()
    if free is None:
        return None
    length = -(-(request.max_model_len or config.max_position_embeddings) // _BLOCK) * _BLOCK
    heads, head_dim = config.num_key_value_heads or 0, config.head_dim or 0  # never null once it is made
    width = 2 * config.num_hidden_layers * heads * head_dim
    return min(_REQUESTS * length * width * (2 if request.dtype == "bfloat16" else 4), free // 4)


def _free_memory() -> int | None:
    """Bytes that programs can still take; None where it isn't known (only Linux says)."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _missing(engine: str) -> list[str]:
    packages = ("vllm",) if engine == "vllm" else _SERVER_PACKAGES
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _check_plugin() -> None:
    """vLLM finds the architecture by an entry point, in each of its processes: a path to the source is not enough."""
    plugins = [entry.name for entry in importlib.metadata.entry_points(group=_PLUGINS_GROUP)]
    if "dsmoe" not in plugins:
        raise UserError(
            "vLLM finds dsmoe by its entry point, and that isn't installed here (a path in PYTHONPATH is not enough, "
            "and an older installation lacks it): pip install --no-deps -e . in the checkout, or pip install dsmoe"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "dsmoe" not in allowed.split(","):
        raise UserError(f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin; add dsmoe to it")
