"""A GGUF file read back as a stock transformers model.

What stands in the file is all that is used here: hyper-parameters by their keys, tensors by the names that the package
`gguf` itself maps from those of transformers. So a swapped or missing tensor, a forgotten permutation or a wrong number
gives other logits than the original's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from dsmoe.errors import UserError


def read_gguf(gguf: Any, path: Path) -> PreTrainedModel:
    """Load a file as OLMoE, Qwen2-MoE or Llama of transformers, in float32.

    Args:
        gguf: the module `gguf`.
        path: the file.

    Raises:
        UserError: tensors are missing, superfluous or of a wrong shape.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    made_class, config = _config(reader, architecture)
    with torch.device("meta"):
        model = made_class(config)
    try:
        model.load_state_dict(_weights(gguf, reader, architecture, model), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"the file read back does not load: {' '.join(str(error).split())[:300]}") from None
    # buffers are no part of a state dict
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if architecture != "llama":
        model.set_experts_implementation("eager")
    return model.eval()


def _config(reader: Any, architecture: str) -> tuple[Any, Any]:
    def value(key: str) -> Any:
        return reader.fields[f"{architecture}.{key}"].contents()

    fields = {
        "vocab_size": value("vocab_size"),
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": value("attention.head_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("rope.freq_base")},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "llama":
        return LlamaForCausalLM, LlamaConfig(**fields)
    # llama.cpp renormalises neither
    fields.update(
        num_experts=value("expert_count"),
        num_experts_per_tok=value("expert_used_count"),
        norm_topk_prob=False,
    )
    if architecture == "olmoe":
        return OlmoeForCausalLM, OlmoeConfig(**fields)
    return Qwen2MoeForCausalLM, Qwen2MoeConfig(
        **fields,
        moe_intermediate_size=value("expert_feed_forward_length"),
        shared_expert_intermediate_size=value("expert_shared_feed_forward_length"),
        qkv_bias=False,
    )


def _weights(gguf: Any, reader: Any, architecture: str, model: Any) -> dict[str, Tensor]:
    """The state dict of `model`, every tensor of the file used once."""
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    found = {tensor.name: tensor for tensor in reader.tensors}

    def take(module: str) -> Tensor:
        name = f"{names.get_name(module)}.weight"
        if name not in found:
            raise UserError(f"the file read back lacks the tensor {name} ({module})")
        tensor = found.pop(name)
        # a copy: the reader's memory is that of the file
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))

    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    weights = {}
    for name in model.state_dict():
        module = name.removesuffix(".weight")
        layer, _, last = module.rpartition(".")
        if last == "gate_up_proj":
            weights[name] = torch.cat([take(f"{layer}.gate_proj"), take(f"{layer}.up_proj")], dim=1)
        elif last == "shared_expert_gate":
            weights[name] = take(module)[None]
        elif architecture == "llama" and last in heads:
            weights[name] = _halves_together(take(module), heads[last])
        else:
            weights[name] = take(module)
    if found:
        raise UserError(f"the file read back holds superfluous tensors: {', '.join(sorted(found)[:3])}")
    return weights


def _halves_together(rows: Tensor, num_heads: int) -> Tensor:
    """Undo the pairwise order of rotary rows: first all even rows of a head, then all odd ones."""
    return torch.cat([part for head in rows.chunk(num_heads) for part in (head[0::2], head[1::2])])
