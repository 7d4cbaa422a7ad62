"""The model inside vLLM: the transformers model of `dsmoe.model`, with vLLM's attention, cache and linear layers.

It is vLLM's transformers backend (`vllm/model_executor/models/transformers`), with three things of our own: weights
come from disk in transformers' layout and stay in memory in ours (see `dsmoe.model.weights`), each layer gets its
attention here (a layer may have fewer heads than the config says, where attention experts were removed), and the MLP
experts are computed as `dsmoe.serving.experts_path` says. Read against vLLM 0.32.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
from vllm.model_executor.models.transformers.moe import MoEMixin
from vllm.model_executor.models.utils import maybe_prefix

from dsmoe.model.attention import KeyValueAttention
from dsmoe.model.mlp import MixtureMLP
from dsmoe.model.moa import MixtureOfHeads
from dsmoe.model.weights import TRANSPOSED_ON_DISK
from dsmoe.serving.experts_path import experts_path
from dsmoe.serving.fused_experts import route_into_fused
from dsmoe.serving.limits import check_engine

# vLLM's loggers, and so its format and level, are those below "vllm"
logger = init_logger("vllm.dsmoe")


class DSMoEForCausalLM(TransformersForCausalLM):
    """A dsmoe model whose experts are computed by the model's own modules ("own")."""

    supports_pp = False
    supports_lora = False

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        """The class that DSMOE_VLLM_EXPERTS asks for."""
        config = vllm_config.model_config.hf_config
        if experts_path(config, vllm_config.device_config.device_type) == "fused":
            cls = DSMoEFusedForCausalLM
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_engine(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        logger.info("dsmoe: MLP experts are computed by %s", self._experts_of())

    def _experts_of(self) -> str:
        return "this model's own code (DSMOE_VLLM_EXPERTS=own)"

    def _create_attention_instances(self, prefix: str = "") -> None:
        runs_all_heads = False
        for name, module in list(self.model.named_modules()):
            if not isinstance(module, KeyValueAttention):
                continue
            heads = self.config.num_attention_heads
            if isinstance(module, MixtureOfHeads):
                heads = module.experts_q_proj.shape[0] * module.heads_per_expert
                module.num_key_value_groups = module.experts_q_proj.shape[0]
                runs_all_heads |= not self.config.is_dense_layer("attention", module.layer_idx)
                module.runs_all_heads = True
            attention = Attention(
                num_heads=heads,
                head_size=module.head_dim,
                scale=module.scaling,
                num_kv_heads=self.config.num_key_value_heads,
                cache_config=self.cache_config,
                quant_config=None,
                prefix=maybe_prefix(prefix, f"model.{name}.{VLLM_ATTN_ATTR}"),
            )
            setattr(module, VLLM_ATTN_ATTR, attention)
        if runs_all_heads:
            logger.info(
                "dsmoe: all attention experts are computed, dropped ones with gates of zero: no time is saved"
            )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Embeddings [T, D] of token ids [T], as the table has them: the forward pass normalises them."""
        return self.model.embed_tokens(input_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the names of what they went into."""
        return super().load_weights(in_memory_layout(weights, TRANSPOSED_ON_DISK))


class DSMoEFusedForCausalLM(MoEMixin, DSMoEForCausalLM):
    """A dsmoe model whose experts are computed by vLLM's fused MoE ("fused")."""

    def _experts_of(self) -> str:
        return "vLLM's fused MoE (DSMOE_VLLM_EXPERTS=fused)"

    def recursive_replace(self) -> None:
        """Put vLLM's layers in place of ours."""
        config = self.config
        config.num_experts_per_tok = [config.routing("mlp", i)["k"] for i in range(config.num_hidden_layers)]
        config.norm_topk_prob = False
        super().recursive_replace()
        for module in self.model.modules():
            if isinstance(module, MixtureMLP):
                route_into_fused(module)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """As above; vLLM's experts take transformers' layout."""
        not_experts = tuple(name for name in TRANSPOSED_ON_DISK if "mlp" not in name)
        return super(DSMoEForCausalLM, self).load_weights(in_memory_layout(weights, not_experts))


def in_memory_layout(
    weights: Iterable[tuple[str, Tensor]], transposed: tuple[str, ...]
) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a checkpoint, those of `transposed` turned from [N, D, F] to [N, F, D]."""
    for name, tensor in weights:
        yield name, tensor.transpose(1, 2) if name.endswith(transposed) else tensor
