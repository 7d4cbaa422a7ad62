"""The language model as a transformers architecture (model_type "dsmoe").

Shapes: B batch, S positions, L layers, D hidden size, N experts, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from dsmoe.config import DSMoEConfig
from dsmoe.model.attention import KeyValueAttention, refuse_rows_of_documents
from dsmoe.model.decoder_layer import DSMoEDecoderLayer
from dsmoe.model.experts import Experts
from dsmoe.model.initial import Stored, initialise_experts, initialise_heads, initialise_linear, mark
from dsmoe.model.moa import MixtureOfHeads
from dsmoe.model.norm import RMSNorm, rms_normalize
from dsmoe.model.outputs import DSMoECausalLMOutput, DSMoEModelOutput
from dsmoe.model.policy import policies_of
from dsmoe.model.rotary import RotaryEmbedding
from dsmoe.model.router import Router
from dsmoe.model.weights import register_disk_layout


class DSMoEPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights."""

    config: DSMoEConfig
    config_class = DSMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DSMoEDecoderLayer"]  # noqa: RUF012 (transformers' own form, here and below)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(DSMoEDecoderLayer, index=0),
        "attentions": OutputRecorder(KeyValueAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        # projections into the residual stream: its variance then doesn't grow with depth (GPT-2)
        std_out = std / (2 * self.config.num_hidden_layers) ** 0.5
        if isinstance(module, Experts):
            initialise_experts(
                module.input_proj,
                module.down_proj,
                module.mlp_type == "swiglu",
                (std, std_out),
                module.layer_idx,
                self._stored("mlp", module.layer_idx),
            )
        elif isinstance(module, MixtureOfHeads):
            initialise_heads(
                module.experts_q_proj,
                module.experts_o_proj,
                module.heads_per_expert,
                (std, std_out),
                module.layer_idx,
                self._stored("attention", module.layer_idx),
            )
        elif isinstance(module, Router):
            stds = [std] * len(list(module.parameters()))
            if self.config.router_initializer_range is not None:
                stds[-1] = self.config.router_initializer_range
            for part, (parameter, own) in enumerate(zip(module.parameters(), stds)):
                initialise_linear(parameter, own, module.role, module.layer_idx, part)
        # one without a role is not of this model as it was made, such as a larger table of resize_token_embeddings
        elif isinstance(module, nn.Linear | nn.Embedding) and hasattr(module, "initial_role"):
            role = str(module.initial_role)
            std = std_out if role == "output" else std
            initialise_linear(module.weight, std, role, int(module.initial_layer))  # type: ignore[arg-type]
        else:
            super()._init_weights(module)

    def _stored(self, part: str, layer: int) -> Stored:
        return Stored(self.config.num_experts_of(part), self.config.kept_experts(part, layer))


class DSMoEModel(DSMoEPreTrainedModel):
    """The decoder without the output projection."""

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        mark(self.embed_tokens, "embedding", 0)
        self.layers = nn.ModuleList(
            DSMoEDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DSMoEModelOutput:
        """Run the decoder.

        Args:
            input_ids: [B, S] int64; or give `inputs_embeds` [B, S, D].
            attention_mask: [B, past + S], 0 on padding.
            position_ids: [B, S]; where they restart inside a row, documents are isolated from each other
                (only without attention mask and `past_key_values`; with flash attention a batch of one row alone).
            past_key_values: the cache to continue.
            inputs_embeds: see `input_ids`; as the table has them, for `normalize_embeddings` divides these by their root
                mean square too.
            use_cache: make a cache where none was given.
            **kwargs: passed to the attention implementation.

        Returns:
            DSMoEModelOutput.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if self.config.normalize_embeddings:
            inputs_embeds = rms_normalize(inputs_embeds, self.config.rms_norm_eps)
        # transformers looks for packed documents only where there is no cache, not even an empty one
        given, given_cache = position_ids, past_key_values
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=given_cache,
            # looked at for packed documents, for which the host waits; our own have none
            position_ids=given,
        )
        if given is not None:
            # flash attention is given no mask and finds the documents here
            refuse_rows_of_documents(self.config._attn_implementation, given, causal_mask, given_cache)
            kwargs["position_ids"] = given
        if self.gradient_checkpointing and self.training:
            # a layer is computed again in the backward pass, by when the config may hold other policies
            kwargs["policies"] = policies_of(self.config)
        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        logits = []
        for layer in self.layers:
            hidden_states, *layer_logits = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            logits.append(layer_logits)
        mlp_logits, attention_logits = zip(*logits)
        return DSMoEModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            router_logits=None if mlp_logits[0] is None else mlp_logits,
            attention_router_logits=None if attention_logits[0] is None else attention_logits,
        )


class DSMoEForCausalLM(DSMoEPreTrainedModel, GenerationMixin):
    """The language model: dense twin, SMoE or DS-MoE, as the config says.

    `generate` is that of transformers. On CPU its greedy search and sampling decode with a lean step (see
    `dsmoe.model.generation`, which has a `generate` of its own); `sample_of_transformers` there says for which arguments.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DSMoEConfig) -> None:
        super().__init__(config)
        self.model = DSMoEModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        mark(self.lm_head, "lm_head", 0)
        self.post_init()

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop of greedy search and sampling, with a lean step where that covers the arguments."""
        from dsmoe.model.generation import (
            sample_of_transformers,
        )  # a cycle: generation checks itself with a model

        output = sample_of_transformers(self, *args, **kwargs)
        if output is None:
            output = super()._sample(*args, **kwargs)  # type: ignore[misc]
        return output

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> DSMoECausalLMOutput:
        """Logits, and the language-modelling loss where labels are given.

        transformers reads off this signature which arguments it may prepare and pass, so all are named; in Llama's order.

        Args:
            input_ids: [B, S] int64; this and the next four: see `DSMoEModel.forward`.
            attention_mask: [B, past + S].
            position_ids: [B, S].
            past_key_values: the cache to continue.
            inputs_embeds: [B, S, D] instead of `input_ids`.
            labels: [B, S]: position s is predicted from the positions before it; -100 is ignored.
            use_cache: make a cache where none was given; None: as the config says.
            logits_to_keep: compute only the last so many positions' logits (0: all), or those of an index.
            shift_labels: [B, S] instead of `labels`: position s holds the token that follows input s.
            num_items_in_batch: divide the summed loss by this instead of the number of labels at hand.
            **kwargs: passed on to `DSMoEModel.forward`.

        Returns:
            DSMoECausalLMOutput; router losses are never in `loss` (see `dsmoe.losses`).
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None and shift_labels is None:
            logits, loss = self.lm_head(hidden_states[:, keep, :]), None
        else:
            logits, loss = self.judge(hidden_states[:, keep, :], labels, shift_labels, num_items_in_batch)
        return DSMoECausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            attention_router_logits=outputs.attention_router_logits,
        )

    def judge(
        self,
        hidden_states: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: int | Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] of hidden states [B, S, D] and their loss, see `forward`; one piece for torch.compile."""
        logits = self.lm_head(hidden_states)
        return logits, self.loss_function(
            logits, labels, self.vocab_size, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch
        )


register_disk_layout(DSMoEConfig.model_type)
