"""What a user of an export should know: lost precision, and what other engines do with the architecture.

The lines on llama.cpp (`src/models/olmoe.cpp`, `src/models/qwen2moe.cpp`) and vLLM (`models/olmoe.py`) were read in
their sources; llama.cpp was also run, on the files of `dsmoe.export.gguf`. Neither renormalises OLMoE's gates, whatever
norm_topk_prob says, nor does llama.cpp Qwen2-MoE's; llama.cpp's loaders of both and vLLM's OLMoE want an output
projection of its own; vLLM's OLMoE has the epsilon 1e-5 built in.
"""

import torch

from dsmoe.config import DSMoEConfig
from dsmoe.export.requirements import ARCHITECTURES, uniform_top_k
from dsmoe.export.targets import ROW_BYTES, is_exact, is_tied, padded_width, rows_are_aligned

_VLLM_OLMOE_EPS = 1e-5
LOOP = "load it with experts_implementation='eager'"


def notes_of(config: DSMoEConfig, target: str, dtype: torch.dtype, untie: bool) -> list[str]:
    """One line for each thing to know.

    Args:
        config: of the dsmoe model.
        target: one of FORMATS.
        dtype: of the exported weights.
        untie: whether the output projection is stored in any case.
    """
    if target == "dsmoe":
        return [
            "loads where the dsmoe package is installed; vLLM finds it by the plugin, other stock tools need "
            "trust_remote_code"
        ]
    notes = []
    if config.num_experts > 1 and uniform_top_k(config, target) == config.num_experts:
        notes.append(
            f"all {config.num_experts} experts are kept for every token: `dsmoe sparsify` first for speed"
        )
    if config.normalize_embeddings:
        notes.append("the normalised embedding table is stored, and the output projection beside it, untied")
    return (
        notes
        + _width_notes(config, target, dtype)
        + _precision_notes(config, target, dtype)
        + _engine_notes(config, target, untie)
    )


def _width_notes(config: DSMoEConfig, target: str, dtype: torch.dtype) -> list[str]:
    if target == "llama":
        return []
    notes = []
    width, padded = config.moe_intermediate_size, padded_width(config)
    if width != padded:
        field = "intermediate_size" if target == "olmoe" else "moe_intermediate_size"
        notes.append(
            f"experts are padded from {width} to {padded} hidden units ({field}) with units of zeros, which add nothing: "
            "transformers' default experts (grouped_mm) want a multiple of 8"
        )
    if not rows_are_aligned(config, dtype):
        notes.append(
            f"hidden_size {config.hidden_size} is no multiple of {ROW_BYTES // dtype.itemsize}, which transformers' "
            f"default experts (grouped_mm) want in {str(dtype).removeprefix('torch.')}: {LOOP}"
        )
    return notes


def _precision_notes(config: DSMoEConfig, target: str, dtype: torch.dtype) -> list[str]:
    notes = []
    short = str(dtype).removeprefix("torch.")
    if not is_exact(config, dtype):
        notes.append(
            f"folding (gate scale {config.mlp_gate_scale:g}, normalize_embeddings {config.normalize_embeddings}) was "
            f"done in float32 before rounding to {short}; it is inexact there, since the scale is no power of two or "
            "the embeddings are normalised: export float32 for equality"
        )
    if dtype != torch.float32 and config.num_experts > 1:
        notes.append(
            f"run in {short}, {ARCHITECTURES[target]} also computes router logits in {short} where dsmoe keeps float32: "
            "a near tie may keep another expert"
        )
    return notes


def _engine_notes(config: DSMoEConfig, target: str, untie: bool) -> list[str]:
    if target == "llama":
        return []
    name = ARCHITECTURES[target]
    engines = "llama.cpp and vLLM" if target == "olmoe" else "llama.cpp"
    notes = []
    if config.gate_normalization == "renormalized" and uniform_top_k(config, target) < config.num_experts:
        notes.append(
            f"the gates are renormalised (norm_topk_prob) by transformers, but not by {engines} for {name}: other logits "
            "there"
        )
    if is_tied(config, untie):
        need = "need" if target == "olmoe" else "needs"
        notes.append(f"embeddings are tied: {engines} {need} --untie for {name}")
    if target == "olmoe" and config.rms_norm_eps != _VLLM_OLMOE_EPS:
        notes.append(
            f"rms_norm_eps is {config.rms_norm_eps:g}: vLLM's OLMoE has {_VLLM_OLMOE_EPS:g} built in"
        )
    return notes
