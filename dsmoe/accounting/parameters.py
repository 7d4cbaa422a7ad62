"""Parameter counts from the config alone: total, by part, and those that one token uses."""

from dataclasses import asdict, dataclass
from typing import Any

from dsmoe.accounting.sizes import (
    LayerSizes,
    MeanActive,
    active_experts,
    embedding_parameters,
    layer_sizes,
    stored_experts,
)


@dataclass(frozen=True)
class LayerCounts:
    """Parameters of one decoder layer.

    Args:
        layer: its index, from 0.
        mlp_active_experts: mean MLP experts that a token uses.
        attention_active_experts: mean attention experts that a token uses.
        total: all parameters that the layer stores.
        active: parameters that a token uses on average (rounded).
    """

    layer: int
    mlp_active_experts: float
    attention_active_experts: float
    total: int
    active: int


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model by part. The five parts are disjoint and sum to `total`.

    Args:
        embedding: input embedding plus the output projection if it has its own weights.
        attention: query, key, value and output projections of all layers and stored attention experts.
        mlp: all stored MLP experts of all layers.
        router: all routers.
        norm: all RMSNorm weights.
        active_non_embedding: non-embedding parameters that a token uses on average, routers included
            (rounded). Keys and values are always computed, so k_proj and v_proj count whole.
        mlp_active_fraction: mean over the layers of active MLP experts / MLP experts, removed ones included.
        attention_active_fraction: the same for attention experts.
        layers: the same, layer by layer.
    """

    embedding: int
    attention: int
    mlp: int
    router: int
    norm: int
    active_non_embedding: int
    mlp_active_fraction: float
    attention_active_fraction: float
    layers: tuple[LayerCounts, ...]

    @property
    def total(self) -> int:
        """All parameters; tied weights count once. Equals the sum of numel() over the model's parameters."""
        return self.embedding + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """All parameters without the embedding (the paper's totals are of this kind)."""
        return self.attention + self.mlp + self.router + self.norm

    @property
    def active(self) -> int:
        """`active_non_embedding` plus the whole embedding, though a token reads one row of the table."""
        return self.embedding + self.active_non_embedding

    def as_dict(self) -> dict[str, Any]:
        """Everything above as a JSON-ready dict."""
        sums = {"total": self.total, "non_embedding": self.non_embedding, "active": self.active}
        fields = asdict(self)
        fields["layers"] = list(fields["layers"])
        return {**sums, **fields}


def total_parameters(config: Any) -> int:
    """All parameters of the model; unlike `count_parameters` it needs no routing policy.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
    """
    return embedding_parameters(config) + sum(_layer_totals(config, layer_sizes(config))) + config.hidden_size


def _layer_totals(config: Any, sizes: LayerSizes) -> list[int]:
    """Parameters that each layer stores."""
    always = sizes.key_value + sizes.router + sizes.norm
    stored = zip(stored_experts(config, "mlp"), stored_experts(config, "attention"))
    return [always + sizes.mlp_of(mlp) + sizes.query_output_of(attention) for mlp, attention in stored]


def count_parameters(config: Any, mean_active: MeanActive | None = None) -> ParameterCounts:
    """Count the parameters of a model: total, by part, and active per token.

    Active parameters of a layer with m of N MLP experts and a of A attention experts:
    ``key_value + query_output * a / A + mlp * m / N + routers + norms``.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        mean_active: measured mean active experts, {"mlp": [one per layer], "attention": [...]}; a part that
            is left out follows the config's routing policies.

    Raises:
        UserError: a threshold or top_p policy without its measured mean, or a bad `mean_active`.
    """
    sizes = layer_sizes(config)
    layers, final_norm = config.num_hidden_layers, config.hidden_size
    mlp_experts = active_experts(config, "mlp", mean_active)
    attention_experts = active_experts(config, "attention", mean_active)
    active_per_layer = [
        sizes.key_value
        + sizes.query_output * attention / sizes.num_attention_experts
        + sizes.mlp * mlp / sizes.num_experts
        + sizes.router
        + sizes.norm
        for mlp, attention in zip(mlp_experts, attention_experts)
    ]
    return ParameterCounts(
        embedding=embedding_parameters(config),
        attention=layers * sizes.key_value
        + sum(sizes.query_output_of(stored) for stored in stored_experts(config, "attention")),
        mlp=sum(sizes.mlp_of(stored) for stored in stored_experts(config, "mlp")),
        router=layers * sizes.router,
        norm=layers * sizes.norm + final_norm,
        active_non_embedding=round(sum(active_per_layer)) + final_norm,
        mlp_active_fraction=sum(mlp_experts) / (layers * sizes.num_experts),
        attention_active_fraction=sum(attention_experts) / (layers * sizes.num_attention_experts),
        layers=tuple(
            LayerCounts(layer, mlp_experts[layer], attention_experts[layer], total, round(active))
            for layer, (total, active) in enumerate(zip(_layer_totals(config, sizes), active_per_layer))
        ),
    )
