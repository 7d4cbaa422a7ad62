"""Sizes of a decoder layer's matrices, read from a config: the one place that knows the model's shapes.

Pure Python: nothing here imports torch or transformers, and any object with the attributes of
`dsmoe.config.DSMoEConfig` will do. No matrix of the model has a bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe.errors import UserError

PARTS = ("mlp", "attention")

MeanActive = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class LayerSizes:
    """Parameters of one decoder layer by part with all its experts, and the sizes behind them.

    They are the same in every layer; how many of the experts a layer stores is told by `stored_experts`.

    Args:
        hidden_size: width d of the residual stream.
        head_dim: width of a head.
        num_heads: query heads over all attention experts together.
        num_key_value_heads: key/value heads.
        num_attention_experts: attention experts A (1: ordinary attention).
        num_experts: MLP experts N.
        query_output: q_proj and o_proj of all attention experts: 2 * d * heads * head_dim.
        key_value: k_proj and v_proj, which all attention experts share: 2 * d * kv_heads * head_dim.
        mlp: all MLP experts: 3 * d * intermediate_size (swiglu) or 2 * d * intermediate_size (gelu).
        mlp_router: the router of the MLP experts; 0 if there is one expert.
        attention_router: the router of the attention experts; 0 if there is one.
        norm: the two RMSNorms of the residual stream and those of queries and keys.
    """

    hidden_size: int
    head_dim: int
    num_heads: int
    num_key_value_heads: int
    num_attention_experts: int
    num_experts: int
    query_output: int
    key_value: int
    mlp: int
    mlp_router: int
    attention_router: int
    norm: int

    @property
    def router(self) -> int:
        """Both routers."""
        return self.mlp_router + self.attention_router

    @property
    def attention(self) -> int:
        """The four projections of attention, without router and norms."""
        return self.query_output + self.key_value

    @property
    def total(self) -> int:
        """All parameters of the layer, with all its experts."""
        return self.attention + self.mlp + self.router + self.norm

    def mlp_of(self, experts: int) -> int:
        """Parameters of so many MLP experts."""
        return self.mlp * experts // self.num_experts

    def query_output_of(self, experts: int) -> int:
        """q_proj and o_proj of so many attention experts."""
        return self.query_output * experts // self.num_attention_experts


def layer_sizes(config: Any) -> LayerSizes:
    """Parameters of one decoder layer by part.

    Args:
        config: a DSMoEConfig, or any object with its attributes (null sizes are derived in the same way).
    """
    hidden_size = config.hidden_size
    num_heads = config.num_attention_heads
    num_attention_experts = config.num_attention_experts
    head_dim = config.head_dim or hidden_size // num_heads
    num_key_value_heads = config.num_key_value_heads or num_heads // num_attention_experts
    query_width, key_value_width = num_heads * head_dim, num_key_value_heads * head_dim
    qk_norm = {"none": 0, "full": query_width + key_value_width, "per_head": 2 * head_dim}
    matrices = 3 if config.mlp_type == "swiglu" else 2
    return LayerSizes(
        hidden_size=hidden_size,
        head_dim=head_dim,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        num_attention_experts=num_attention_experts,
        num_experts=config.num_experts,
        query_output=2 * hidden_size * query_width,
        key_value=2 * hidden_size * key_value_width,
        mlp=matrices * hidden_size * config.intermediate_size,
        mlp_router=router_parameters(config, config.num_experts),
        attention_router=router_parameters(config, num_attention_experts),
        norm=2 * hidden_size + qk_norm[config.qk_norm],
    )


def router_parameters(config: Any, num_experts: int) -> int:
    """Parameters of one router: n * d (linear), R * d + n * R (mlp), or 0 where there is nothing to route.

    Args:
        config: as in `layer_sizes`.
        num_experts: experts n that it scores.
    """
    if num_experts == 1:
        return 0
    if config.router_type == "linear":
        return num_experts * config.hidden_size
    return config.router_hidden_size * (config.hidden_size + num_experts)


def embedding_parameters(config: Any) -> int:
    """Parameters of the input embedding and, if it is not tied to it, of the output projection."""
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size


def stored_experts(config: Any, part: str) -> list[int]:
    """Number of experts that each layer stores: N, less those that were removed.

    Args:
        config: as in `layer_sizes`; `mlp_kept_experts` and `attention_kept_experts` may be null or missing (nothing
            was removed).
        part: "mlp" or "attention".
    """
    num_experts = config.num_experts if part == "mlp" else config.num_attention_experts
    kept = getattr(config, f"{part}_kept_experts", None) or [None] * config.num_hidden_layers
    return [num_experts if experts is None else len(experts) for experts in kept]


def active_experts(config: Any, part: str, mean_active: MeanActive | None = None) -> list[float]:
    """Mean number of experts that a token uses, per layer.

    Args:
        config: as in `layer_sizes`; its routing policies may be null, one dict, or one dict per layer.
        part: "mlp" or "attention".
        mean_active: measured means, {"mlp": [one per layer], "attention": [...]}; a part that is left out
            follows the config's policies.

    Returns:
        One number per layer: those that it stores under "dense", k under "top_k" and "threshold_top_k".

    Raises:
        UserError: a policy whose count depends on the text and no measured mean; or a bad `mean_active`.
    """
    layers, stored = config.num_hidden_layers, stored_experts(config, part)
    if mean_active is not None:
        unknown = sorted(set(mean_active) - set(PARTS))
        if unknown:
            raise UserError(f"mean_active has no part {unknown[0]!r}; its keys are {' and '.join(PARTS)}")
        if part in mean_active:
            return _measured(mean_active[part], part, stored)
    policies = config.mlp_routing if part == "mlp" else config.attention_routing
    if policies is None or isinstance(policies, Mapping):
        policies = [policies] * layers
    return [_by_policy(policy, part, layer, stored[layer]) for layer, policy in enumerate(policies)]


def _measured(means: Sequence[float], part: str, stored: Sequence[int]) -> list[float]:
    if len(means) != len(stored):
        raise UserError(f"mean_active[{part!r}] has {len(means)} numbers; the model has {len(stored)} layers")
    for layer, (mean, most) in enumerate(zip(means, stored)):
        if not 1 <= mean <= most:
            raise UserError(
                f"mean_active[{part!r}][{layer}] is {mean}; a token keeps from 1 to {most} experts"
            )
    return [float(mean) for mean in means]


def _by_policy(policy: Mapping[str, Any] | None, part: str, layer: int, stored: int) -> float:
    if stored == 1 or policy is None or policy["policy"] == "dense":
        return float(stored)
    if policy["policy"] in ("top_k", "threshold_top_k") and policy.get("k") is not None:
        return float(policy["k"])
    raise UserError(
        f"model.{part}_routing[{layer}] is {dict(policy)}: how many experts it keeps depends on the text; "
        f"give the measured mean as mean_active[{part!r}]"
    )
