"""Which architecture of llama.cpp holds a model.

| model                          | llama.cpp | why                                                                   |
|--------------------------------|-----------|-----------------------------------------------------------------------|
| qk_norm "full", experts        | olmoe     | the gates are the probabilities of the kept experts, not renormalised |
| qk_norm "none", experts        | qwen2moe  | likewise; its shared expert is one unit of zeros                      |
| qk_norm "none", dense twin     | llama     |                                                                       |
| qk_norm "full", dense twin     | olmoe     | one expert: no dense architecture with pre-norms has this norm        |

The one expert costs nothing in decoding, but a prompt runs through llama.cpp's slower product for experts: 176 MB in
bfloat16 on one thread (8 layers, D = 768), 256 tokens took 0.61 s and as a Llama of the same shape 0.35 s; 48 tokens one
by one 0.48 and 0.50 s. olmo2 has the norm, but normalises after attention and MLP. llama.cpp's olmoe also knows no
grouped-query attention: key-value heads are repeated (see `tensors.kv_repeats`).

llama.cpp passes `norm_w = false` for olmoe and qwen2moe whatever norm_topk_prob says (`src/models/olmoe.cpp`,
`src/models/qwen2moe.cpp`), and its qwen3moe, mixtral and granitemoe always renormalise. So gates "renormalized" are
refused. olmoe and qwen2moe read one K for all layers: of an array of them (`expert_used_count`) they take the first.
"""

import torch

from dsmoe.config import DSMoEConfig
from dsmoe.errors import UserError
from dsmoe.export.requirements import ARCHITECTURES, check_exportable, uniform_top_k

GGUF_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# LLAMA_MAX_EXPERTS and LLAMA_MAX_LAYERS of llama.cpp, which ends the process above them
_MOST_EXPERTS, _MOST_LAYERS = 1024, 512
_KEEP = "`--format dsmoe` keeps it"


def gguf_architecture(config: DSMoEConfig) -> str:
    """The architecture, one of "olmoe", "qwen2moe" and "llama", that llama.cpp runs this model as.

    Raises:
        UserError: llama.cpp has none for it.
    """
    if config.qk_norm == "per_head":
        raise UserError(
            "model.qk_norm is 'per_head'; those architectures of llama.cpp that have it and experts renormalise the "
            f"gates; `--format gguf` needs 'full' or 'none'; {_KEEP}"
        )
    if config.qk_norm == "full":
        architecture = "olmoe"
    else:
        architecture = "llama" if config.num_experts == 1 else "qwen2moe"
    # l2: `check_exportable` would advise "renormalized" as well
    if config.gate_normalization == "l2" and config.num_experts > 1:
        raise UserError(
            f"model.gate_normalization is 'l2', which divides by the norm of the probabilities of all experts; llama.cpp "
            f"divides those of {ARCHITECTURES[architecture]} by nothing: train with 'softmax'; {_KEEP}"
        )
    try:
        check_exportable(config, architecture)
    except UserError as error:
        raise UserError(f"llama.cpp would run it as {ARCHITECTURES[architecture]}: {error}") from None
    _check_limits(config, architecture)
    return architecture


def _check_limits(config: DSMoEConfig, architecture: str) -> None:
    name = ARCHITECTURES[architecture]
    if (
        config.num_experts > 1
        and config.gate_normalization == "renormalized"
        and uniform_top_k(config, architecture) < config.num_experts
    ):
        raise UserError(
            f"model.gate_normalization is 'renormalized'; llama.cpp does not divide the gates of {name} by their sum, "
            f"whatever norm_topk_prob says: train with 'softmax', or use `--format {architecture}` with transformers"
        )
    for what, value, most in (
        ("num_experts", config.num_experts, _MOST_EXPERTS),
        ("num_hidden_layers", config.num_hidden_layers, _MOST_LAYERS),
    ):
        if value > most:
            raise UserError(f"model.{what} is {value}; llama.cpp takes at most {most}; {_KEEP}")
