"""A decoder layer: attention and MLP, each with its norm, around the residual stream.

Shapes: B batch, S positions, D hidden size, N MLP experts, A attention experts.
"""

from typing import Any

from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from dsmoe.config import DSMoEConfig
from dsmoe.model.attention import Attention
from dsmoe.model.mlp import MixtureMLP
from dsmoe.model.moa import MixtureOfHeads
from dsmoe.model.norm import RMSNorm
from dsmoe.model.policy import Policies, under_policies


class DSMoEDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm decoder layer. Returns the hidden states and the logits of its two routers (None where absent).

    Its halves are methods of their own for torch.compile: with thresholds that move, the MLP alone stays uncompiled.
    """

    def __init__(self, config: DSMoEConfig, layer_idx: int) -> None:
        super().__init__()
        attention = MixtureOfHeads if config.num_attention_experts > 1 else Attention
        self.self_attn = attention(config, layer_idx)
        self.mlp = MixtureMLP(config, layer_idx)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden_states: Tensor, policies: Policies | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states [B, S, D] to hidden states, MLP router logits [B, S, N], attention router logits [B, S, A].

        With `policies` these are taken in place of the config's.
        """
        if policies is not None:
            with under_policies(self.mlp.config, policies):
                return self._forward(hidden_states, **kwargs)
        return self._forward(hidden_states, **kwargs)

    def _forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        hidden_states, attention_logits = self.attend(hidden_states, **kwargs)
        hidden_states, mlp_logits = self.mix(hidden_states)
        return hidden_states, mlp_logits, attention_logits

    def attend(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The attention half: hidden states [B, S, D] and attention router logits [B, S, A]."""
        attended, _, logits = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attended, logits

    def mix(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP half: hidden states [B, S, D] and MLP router logits [B, S, N]."""
        mixed, logits = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + mixed, logits
