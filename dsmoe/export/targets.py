"""The target models: their configuration and their weights, made from a dsmoe model.

Shapes: V vocabulary, D hidden size, N experts, F hidden units of one expert.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from dsmoe.config import DSMoEConfig
from dsmoe.export.requirements import uniform_top_k
from dsmoe.model import DSMoEForCausalLM
from dsmoe.model.norm import rms_normalize

ROW_BYTES = 16  # see `padded_width`

_MODEL_CLASSES: dict[str, Any] = {
    "olmoe": OlmoeForCausalLM,
    "qwen2moe": Qwen2MoeForCausalLM,
    "llama": LlamaForCausalLM,
}


def is_exact(config: DSMoEConfig, dtype: torch.dtype) -> bool:
    """Whether folding commutes with rounding the weights to `dtype`, so that nothing but the cast itself is lost."""
    power_of_two = math.frexp(_folded_scale(config))[0] == 0.5
    return dtype == torch.float32 or (power_of_two and not config.normalize_embeddings)


def is_tied(config: DSMoEConfig, untie: bool) -> bool:
    """Whether the export shares embedding table and output projection; a normalised table is no output projection."""
    return config.tie_word_embeddings and not config.normalize_embeddings and not untie


def padded_width(config: DSMoEConfig) -> int:
    """Hidden units of an exported expert: the next multiple of 8; those beyond the model's are zeros and add nothing.

    What transformers computes experts with by default (grouped_mm) wants rows of weights of a multiple of 16 bytes: 8
    numbers of bfloat16. The other side of those matrices, the hidden size, can't be padded: RMSNorm divides by it.
    """
    width: Any = config.moe_intermediate_size  # derived by now
    multiple = ROW_BYTES // torch.bfloat16.itemsize
    return -(-width // multiple) * multiple


def rows_are_aligned(config: DSMoEConfig, dtype: torch.dtype) -> bool:
    """Whether the hidden size is one that grouped_mm takes in this dtype."""
    return config.hidden_size * dtype.itemsize % ROW_BYTES == 0


def target_config(
    config: DSMoEConfig, target: str, untie: bool = False, *, pad: bool = True
) -> PreTrainedConfig:
    """The configuration of the target architecture for an exportable model; `pad`: of `padded_width`."""
    sizes: Any = config  # what may be null in a config file is derived by now
    fields: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "bos_token_id",
                     "eos_token_id", "pad_token_id")
    }  # fmt: skip
    fields.update(
        hidden_act="silu",
        # the model reads theta alone, whatever else stands in its rope_parameters
        rope_parameters={"rope_type": "default", "rope_theta": float(sizes.rope_parameters["rope_theta"])},
        tie_word_embeddings=is_tied(config, untie),
    )
    if target == "llama":
        return LlamaConfig(
            **fields, intermediate_size=config.intermediate_size, attention_bias=False, mlp_bias=False
        )
    fields.update(
        num_experts=config.num_experts,
        num_experts_per_tok=uniform_top_k(config, target),
        norm_topk_prob=config.gate_normalization == "renormalized",
        output_router_logits=False,
        router_aux_loss_coef=0.0,
    )
    width = padded_width(config) if pad else sizes.moe_intermediate_size
    if target == "olmoe":
        return OlmoeConfig(**fields, intermediate_size=width, attention_bias=False, clip_qkv=None)
    return Qwen2MoeConfig(
        **fields,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=width,
        shared_expert_intermediate_size=1,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        qkv_bias=False,
        use_sliding_window=False,
        max_window_layers=config.num_hidden_layers,
    )


def target_weights(
    model: DSMoEForCausalLM, target: str, dtype: torch.dtype, *, pad: bool = True
) -> dict[str, Tensor]:
    """The state dict of the target model.

    Args:
        model: exportable, in float32: scale and normalisation are applied before the one rounding to `dtype`.
        target: "olmoe", "qwen2moe" or "llama".
        dtype: of the result.
        pad: experts to their `padded_width`.
    """
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if ".mlp." in name:
            continue
        weights[name] = value.to(dtype)
    if model.config.normalize_embeddings:
        table_VD = model.model.embed_tokens.weight.detach()
        weights["model.embed_tokens.weight"] = rms_normalize(table_VD, model.config.rms_norm_eps).to(dtype)
    for layer, module in enumerate(model.model.layers):
        made = _mlp_weights(module, model.config, target, pad)
        weights.update({f"model.layers.{layer}.mlp.{name}": value.to(dtype) for name, value in made.items()})
    return weights


def target_model(
    model: DSMoEForCausalLM, target: str, dtype: torch.dtype, untie: bool = False, *, pad: bool = True
) -> PreTrainedModel:
    """The target model with its weights in `dtype`, to be saved (its rotary buffers are not materialised)."""
    # on "meta" nothing is allocated or drawn; the weights are then assigned, not copied
    with torch.device("meta"):
        made = _MODEL_CLASSES[target](target_config(model.config, target, untie, pad=pad))
    weights = target_weights(model, target, dtype, pad=pad)
    if untie:
        # safetensors stores no two names for one tensor
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    made.load_state_dict(weights, strict=True, assign=True)
    made.tie_weights()
    made.generation_config = model.generation_config
    return made


def _folded_scale(config: DSMoEConfig) -> float:
    # a dense twin has no gates
    return 1.0 if config.num_experts == 1 or config.mlp_gate_scale is None else config.mlp_gate_scale


def _mlp_weights(layer: Any, config: DSMoEConfig, target: str, pad: bool) -> dict[str, Tensor]:
    mlp = layer.mlp
    gate_up_NHD = mlp.experts.gate_up_proj.detach()
    down_NDF = (mlp.experts.down_proj.detach() * _folded_scale(config)).transpose(1, 2).contiguous()
    if target == "llama":
        gate_FD, up_FD = gate_up_NHD[0].chunk(2)
        return {
            "gate_proj.weight": gate_FD.contiguous(),
            "up_proj.weight": up_FD.contiguous(),
            "down_proj.weight": down_NDF[0],
        }
    hidden = config.hidden_size
    # the softmax over one expert is 1 whatever its logit: a dense twin takes a router of zeros
    router_ND = gate_up_NHD.new_zeros(1, hidden) if mlp.router is None else mlp.router.weight.detach()
    if pad:
        missing = padded_width(config) - down_NDF.shape[-1]
        parts = [functional.pad(part, (0, 0, 0, missing)) for part in gate_up_NHD.chunk(2, dim=1)]
        gate_up_NHD, down_NDF = torch.cat(parts, dim=1), functional.pad(down_NDF, (0, missing))
    weights = {
        "gate.weight": router_ND,
        "experts.gate_up_proj": gate_up_NHD,
        "experts.down_proj": down_NDF,
    }
    if target == "qwen2moe":
        weights.update(_shared_expert(layer.post_attention_layernorm.weight.detach()))
    return weights


def _shared_expert(norm_D: Tensor) -> dict[str, Tensor]:
    """A shared expert that always gives 0: one hidden unit, all weights zero.

    Its gate, a sigmoid times that 0, is free. It reads one channel instead of none, the one with the largest norm
    weight: llama.cpp computes sigmoid(x) as silu(x) / x, so a gate of zeros would be 0 / 0 there.
    """
    hidden = norm_D.numel()
    gate_1D = norm_D.new_zeros(1, hidden)
    gate_1D[0, norm_D.abs().argmax()] = 1.0
    return {
        "shared_expert.gate_proj.weight": norm_D.new_zeros(1, hidden),
        "shared_expert.up_proj.weight": norm_D.new_zeros(1, hidden),
        "shared_expert.down_proj.weight": norm_D.new_zeros(hidden, 1),
        "shared_expert_gate.weight": gate_1D,
    }
