"""What a model is: kind, routing policy, total and active parameters, for any model of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsmoe import files
from dsmoe.accounting import count_parameters
from dsmoe.errors import UserError

_SPARSITY = ("num_params_active", "mlp_active_fraction", "attention_active_fraction")


def describe_model(path: str | Path, model: Any) -> dict[str, Any]:
    """Kind, policy and parameter counts of a model.

    Active parameters are those that a token uses on average, embeddings counted whole. They come from a
    `sparsity.json` in the folder (measured by the sparsifier), else follow from the config: a policy with a
    fixed number of experts, or another architecture's experts per token. A threshold that was never measured
    gives null.

    Args:
        path: the model's folder or Hub id.
        model: the loaded model.

    Returns:
        {"kind": "dense", "smoe", "dsmoe", or null for another architecture, "policy", "num_params_total"
        (tied weights once), "num_params_embedding", "num_params_active", "mlp_active_fraction",
        "attention_active_fraction"}.

    Raises:
        UserError: the folder's `sparsity.json` is none.
    """
    ours = model.config.model_type == "dsmoe"
    described: dict[str, Any] = {
        "kind": model.config.kind if ours else None,
        "policy": _policy(model.config) if ours else None,
        "num_params_total": sum(parameter.numel() for parameter in model.parameters()),
        "num_params_embedding": _embedding(model),
    }
    described.update(_active_of_config(model.config) if ours else _active_of_other(model))
    measured = Path(path) / "sparsity.json"
    if measured.is_file():
        sparsity = files.read_json(measured)
        try:
            policy = _shortened(sparsity["policy"])
            counts = {key: sparsity[key] for key in _SPARSITY}
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{measured}: not a report of dsmoe sparsify ({type(error).__name__}: {error}); make the folder again, "
                "or remove the file"
            ) from None
        # a report of other policies than the model's is out of date
        if not ours or policy == described["policy"]:
            described.update(counts)
            described["policy"] = policy
    return described


def _policy(config: Any) -> dict[str, Any] | None:
    if config.kind == "dense":
        return None
    return _shortened({"mlp": config.mlp_routing, "attention": config.attention_routing})


def _shortened(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Policies per part, with one dict in place of a list of equal ones."""
    short = {}
    for part, layers in policy.items():
        alike = isinstance(layers, list) and layers and all(one == layers[0] for one in layers)
        short[part] = layers[0] if alike else layers
    return short


def _embedding(model: Any) -> int:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(table.weight): table.weight.numel() for table in tables if table is not None}
    return sum(weights.values())


def _active_of_config(config: Any) -> dict[str, Any]:
    try:
        counts = count_parameters(config)
    except UserError:  # the number of active experts depends on the text, and was not measured
        return dict.fromkeys(_SPARSITY)
    return {
        "num_params_active": counts.active,
        "mlp_active_fraction": counts.mlp_active_fraction,
        "attention_active_fraction": counts.attention_active_fraction,
    }


def _active_of_other(model: Any) -> dict[str, Any]:
    """Another architecture: parameters below a module named `experts` count k / N, all others whole."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(value.numel() for name, value in model.named_parameters() if ".experts." in name)
    fraction = 1.0
    if experts:
        top_k = _first(model.config, "num_experts_per_tok", "moe_topk", "moe_k")
        num_experts = _first(model.config, "num_experts", "num_local_experts", "n_routed_experts")
        if not isinstance(top_k, int) or not isinstance(num_experts, int):
            return dict.fromkeys(_SPARSITY)
        fraction = top_k / num_experts
    return {
        "num_params_active": round(total - experts * (1 - fraction)),
        "mlp_active_fraction": fraction,
        "attention_active_fraction": 1.0,
    }


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
