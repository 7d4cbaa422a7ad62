"""Floating-point operations per token from the config alone.

Only matrix products count, an [m, k] by [k, n] product as 2*m*n*k. Norms, rotary embeddings, softmax,
activations and gates are left out: at width d they cost O(1/d) of the matrix products.
"""

from dataclasses import dataclass, replace
from typing import Any

from dsmoe.accounting.sizes import MeanActive, active_experts, layer_sizes, stored_experts


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass by part.

    Args:
        attention_projections: q_proj, k_proj, v_proj and o_proj.
        attention_scores: queries times keys, and attention weights times values.
        mlp: the MLP experts.
        router: the routers.
        lm_head: the output projection.
    """

    attention_projections: float
    attention_scores: float
    mlp: float
    router: float
    lm_head: float

    @property
    def layers(self) -> float:
        """All decoder layers, i.e. everything but the output projection."""
        return self.attention_projections + self.attention_scores + self.mlp + self.router

    @property
    def total(self) -> float:
        """The whole forward pass."""
        return self.layers + self.lm_head


def forward_flops_per_token(
    config: Any,
    context_length: float,
    mean_active: MeanActive | None = None,
    all_experts: bool = False,
) -> ForwardFlops:
    """FLOPs of one token's forward pass by part.

    Per layer, with m of N MLP experts, a of A attention experts (H * a / A query heads) and c keys in
    context::

        projections  2 * (key_value + query_output * a / A)
        scores       2 * 2 * c * head_dim * H * a / A
        mlp          2 * mlp * m / N
        router       2 * router

    where a name stands for the parameters of that part (`dsmoe.accounting.sizes.LayerSizes`; like N and A it counts
    experts that were removed, m and a never do); and once ``lm_head = 2 * vocab_size * d``. Scores are those of the
    kept heads, as in decoding; over many tokens that keep different heads the model computes the scores of all stored
    heads and saves only projections.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        context_length: keys that the token attends to, itself included.
        mean_active: measured mean active experts, as in `count_parameters`.
        all_experts: compute every expert that is stored, whatever the routing policies say.

    Raises:
        UserError: a threshold or top_p policy without its measured mean, or a bad `mean_active`.
    """
    sizes = layer_sizes(config)
    layers = config.num_hidden_layers

    def share(part: str, num_experts: int) -> float:
        computed = stored_experts(config, part) if all_experts else active_experts(config, part, mean_active)
        return sum(computed) / num_experts

    mlp_share = share("mlp", sizes.num_experts)
    attention_share = share("attention", sizes.num_attention_experts)
    return ForwardFlops(
        attention_projections=2.0 * (layers * sizes.key_value + attention_share * sizes.query_output),
        attention_scores=4.0 * context_length * sizes.head_dim * sizes.num_heads * attention_share,
        mlp=2.0 * mlp_share * sizes.mlp,
        router=2.0 * layers * sizes.router,
        lm_head=2.0 * config.vocab_size * config.hidden_size,
    )


def inference_flops_per_token(
    config: Any, context_length: float, mean_active: MeanActive | None = None
) -> float:
    """FLOPs to generate one token with a KV cache: the forward pass of the kept experts and the routers.

    For the prefill of a prompt of T tokens use its mean context, (T + 1) / 2, and multiply by T; that
    includes the output projection of every prompt token, which a server computes only for the last.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        context_length: tokens in the KV cache, the new one included.
        mean_active: measured mean active experts, as in `count_parameters`.

    Raises:
        UserError: as `forward_flops_per_token`.
    """
    return forward_flops_per_token(config, context_length, mean_active).total


def training_forward_flops_per_token(
    config: Any,
    sequence_length: int,
    mean_active: MeanActive | None = None,
    causal: bool = False,
    masked: bool = False,
) -> ForwardFlops:
    """FLOPs of one token's forward pass in training.

    A dense model and a DS-MoE compute all their experts, whatever policies the config holds for inference; an SMoE,
    and a step of the mask phase, only those that are kept (with attention experts still the scores of all heads, as
    the tokens keep different ones).

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        sequence_length: tokens of a training sequence.
        mean_active: measured mean active experts, as in `count_parameters`: for a step of the mask phase, and for an
            SMoE trained with a threshold.
        causal: count only the visible half of the attention scores, (T + 1) / 2 keys a token. The default
            counts all T, which is the convention of PaLM (arXiv 2204.02311, appendix B) and of torch's
            FlopCounterMode.
        masked: of a step of the mask phase, which computes the kept experts only.

    Raises:
        UserError: as `forward_flops_per_token`.
    """
    context = (sequence_length + 1) / 2 if causal else sequence_length
    all_experts = forward_flops_per_token(config, context, all_experts=True)
    if not masked and config.kind != "smoe":
        return all_experts
    kept = forward_flops_per_token(config, context, mean_active)
    return replace(kept, attention_scores=all_experts.attention_scores)


def training_flops_per_token(
    config: Any,
    sequence_length: int,
    mean_active: MeanActive | None = None,
    gradient_checkpointing: bool = False,
    causal: bool = False,
    masked: bool = False,
    recompute_experts: bool = False,
) -> float:
    """FLOPs of one training step divided by its tokens: forward plus a backward of twice the forward.

    ``3 * forward.total``, plus ``forward.layers`` with gradient checkpointing, which runs every decoder
    layer's forward a second time (the output projection is not recomputed; torch may stop the recomputation
    of a layer before its last products, which saves a little), plus the experts' input projections where those are
    recomputed (in all-experts mode only).

    Args:
        config: as in `training_forward_flops_per_token`, like all arguments that aren't named here.
        sequence_length: the same.
        mean_active: the same.
        gradient_checkpointing: recompute the layers in the backward pass.
        causal: the same.
        masked: the same.
        recompute_experts: recompute the experts' pre-activations in the backward pass.

    Raises:
        UserError: as `forward_flops_per_token`.
    """
    forward = training_forward_flops_per_token(config, sequence_length, mean_active, causal, masked)
    again = forward.layers if gradient_checkpointing else 0.0
    if recompute_experts and not masked and config.kind != "smoe":
        # of SwiGLU's three products two, of gelu's two one
        again += forward.mlp * (2 / 3 if config.mlp_type == "swiglu" else 1 / 2)
    return 3 * forward.total + again
