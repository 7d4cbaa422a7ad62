"""What the model returns.

Shapes: B batch, S positions, L layers, D hidden size, N MLP experts, A attention experts, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput


@dataclass
class DSMoEModelOutput(ModelOutput):
    """What `DSMoEModel` returns.

    Attributes:
        last_hidden_state: [B, S, D].
        past_key_values: the cache, where one is used.
        hidden_states: L + 1 tensors [B, S, D], if asked for.
        attentions: L tensors of attention weights, if asked for and given by the attention implementation.
        router_logits: L tensors [B, S, N] of the MLP routers, at least float32; None in a dense twin.
        attention_router_logits: L tensors [B, S, A] of the attention routers; None without attention experts.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None


@dataclass
class DSMoECausalLMOutput(ModelOutput):
    """What `DSMoEForCausalLM` returns: `loss` (language modelling alone, nats per token), `logits` [B, S, V], and
    the fields of `DSMoEModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    attention_router_logits: tuple[Tensor, ...] | None = None
