"""The tensors and hyper-parameters of a GGUF file, made from the stock target model.

Shapes: V vocabulary, D hidden size, N experts, F hidden units of one expert, H heads. GGUF lists dimensions innermost
first, so that a PyTorch tensor [N, F, D] is stored as it lies in memory.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

# of the target model, beside the experts: name in transformers, name in GGUF
_WHOLE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.experts.down_proj": "ffn_down_exps.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
}
_GATE_UP = "mlp.experts.gate_up_proj"
# llama.cpp's own converter keeps them in float32, and a router in less would choose other experts
_FULL_PRECISION = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


def gguf_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a target model (float32) under their names in GGUF.

    Args:
        model: OLMoE, Qwen2-MoE or Llama of transformers.
    """
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, value in model.state_dict().items():
        if name in _WHOLE_MODEL:
            yield _WHOLE_MODEL[name], value
            continue
        layer, _, part = name.removeprefix("model.layers.").partition(".")
        if part == _GATE_UP:
            gate_NFD, up_NFD = value.chunk(2, dim=1)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate_NFD.contiguous()
            yield f"blk.{layer}.ffn_up_exps.weight", up_NFD.contiguous()
            continue
        if part == "mlp.shared_expert_gate.weight":
            value = value[0]
        projection = part.removeprefix("self_attn.").removesuffix(".weight")
        if projection in ("k_proj", "v_proj", "k_norm"):
            value = repeat_heads(value, model.config.num_key_value_heads, kv_repeats(model.config))
        if model.config.model_type == "llama" and projection in heads:
            value = interleave_rotary(value, heads[projection])
        yield f"blk.{layer}.{_LAYER[part]}", value


def interleave_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a query or key projection [H * 2P, D] for llama.cpp's Llama.

    transformers rotates row i of a head together with row i + P; llama.cpp's Llama does so with rows 2i and 2i + 1
    (its olmoe and qwen2moe rotate as transformers does, and take the rows as they are).
    """
    halves = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def kv_repeats(config: Any) -> int:
    """How often each key-value head is stored: llama.cpp's olmoe has as many of them as query heads.

    Its norm of the keys has D weights, so that a file with fewer heads does not load. Repeated heads give the same
    attention, and the same norm too: the mean of squares over all of them is that over one copy of each.
    """
    return config.num_attention_heads // config.num_key_value_heads if config.model_type == "olmoe" else 1


def repeat_heads(weight: Tensor, num_heads: int, repeats: int) -> Tensor:
    """Repeat the rows [H * P, ...] of each head, so that query heads find copies of their own head in their place."""
    if repeats == 1:
        return weight
    return weight.unflatten(0, (num_heads, -1)).repeat_interleave(repeats, dim=0).flatten(0, 1)


def is_full_precision(name: str, value: Tensor) -> bool:
    """Whether a tensor stays float32 in a file of any dtype: norms and routers."""
    return value.ndim == 1 or name.endswith(_FULL_PRECISION)


def round_as_stored(model: Any, dtype: torch.dtype) -> None:
    """Round a dsmoe model's weights in place to what a file of `dtype` holds; they stay float32 tensors."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ".router." not in name:
                parameter.copy_(parameter.to(dtype).float())


def add_tensors(writer: Any, gguf: Any, model: Any, dtype: torch.dtype) -> None:
    """Hand a target model's tensors to a GGUFWriter.

    Args:
        writer: the GGUFWriter.
        gguf: the module `gguf`.
        model: the target model, float32.
        dtype: of the matrices; norms and routers stay float32.
    """
    stored = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
        torch.float16: gguf.GGMLQuantizationType.F16,
    }
    for name, value in gguf_tensors(model):
        kind = stored[torch.float32 if is_full_precision(name, value) else dtype]
        # what float16 can't hold becomes infinite; the check refuses it, with a reason
        with np.errstate(over="ignore"):
            data = gguf.quants.quantize(np.ascontiguousarray(value.detach().numpy()), kind)
        writer.add_tensor(name, data, raw_dtype=kind)


def add_hyper_parameters(writer: Any, config: Any) -> None:
    """Hand the configuration of a target model to a GGUFWriter."""
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads * kv_repeats(config))
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "llama":
        return
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if config.model_type == "qwen2_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
