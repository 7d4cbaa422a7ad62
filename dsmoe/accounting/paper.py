"""The nine models of arXiv 2404.05567 (tables 1 and 3) against our counts of the same shapes.

`read_model_config` imports DSMoEConfig and with it transformers, so the package does not import this module.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsmoe.accounting.parameters import count_parameters
from dsmoe.accounting.sizes import layer_sizes
from dsmoe.accounting.table import markdown_table
from dsmoe.errors import UserError
from dsmoe.files import load_yaml

MILLION = 1e6


@dataclass(frozen=True)
class PaperModel:
    """One row of the paper's tables.

    Args:
        name: the paper's name.
        file: stem of our YAML under configs/model.
        total: total parameters in millions as printed.
        active: active parameters in millions as printed.
        router_counted: whether we count the router as active to meet the printed number; the paper does not
            say, and its own numbers differ in this.
    """

    name: str
    file: str
    total: int
    active: int
    router_counted: bool = True


PAPER_MODELS = (
    PaperModel("Dense-1B", "dense_1b", 1017, 1017),
    PaperModel("Dense-3B", "dense_3b", 2705, 2705),
    PaperModel("Dense-6B", "dense_6b", 6186, 6186),
    PaperModel("SMoE-1B", "smoe_1b", 1042, 419, router_counted=False),
    PaperModel("SMoE-1.5B", "smoe_1.5b", 1445, 419, router_counted=False),
    PaperModel("SMoE-5B", "smoe_5b", 4911, 1212),
    PaperModel("DS-MoE-1B", "dsmoe_1b", 1067, 439),
    PaperModel("DS-MoE-3B", "dsmoe_3b", 2846, 934),
    PaperModel("DS-MoE-6B", "dsmoe_6b", 6343, 1813),
)


@dataclass(frozen=True)
class Comparison:
    """One model: the paper's counts and ours, without embeddings, and the assumption behind the active count.

    Args:
        name: the paper's name.
        paper_total: the paper's total.
        total: ours.
        paper_active: the paper's active parameters.
        active: ours under `assumption`; equal to the paper's by construction if `fitted`.
        fitted: whether the mean number of active MLP experts was solved for from `paper_active`.
        mean_active_mlp_experts: what was assumed, or solved for.
        assumption: in words, with what the other reading of the router would give.
    """

    name: str
    paper_total: int
    total: int
    paper_active: int
    active: int
    fitted: bool
    mean_active_mlp_experts: float
    assumption: str

    @property
    def total_difference(self) -> float:
        """Relative difference of our total to the paper's."""
        return self.total / self.paper_total - 1

    @property
    def active_difference(self) -> float:
        """Relative difference of our active parameters to the paper's."""
        return self.active / self.paper_active - 1

    def as_dict(self) -> dict[str, Any]:
        """Everything above as a JSON-ready dict."""
        differences = {"total_difference": self.total_difference, "active_difference": self.active_difference}
        return {**asdict(self), **differences}


def read_model_config(path: str | Path) -> Any:
    """Read a DSMoEConfig from a YAML that maps its fields.

    Raises:
        UserError: the file is missing, not such a mapping, or names an unknown field.
    """
    from dsmoe.config import DSMoEConfig  # transformers: see the top of this file

    fields = load_yaml(path)
    if not isinstance(fields, dict):
        raise UserError(f"{path}: must be a mapping of DSMoEConfig fields")
    unknown = sorted(set(fields) - set(DSMoEConfig.__dataclass_fields__))
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is not a field of DSMoEConfig")
    try:
        return DSMoEConfig.from_dict(fields)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


def solve_mean_active_mlp_experts(
    config: Any, active_non_embedding: float, count_router: bool = True
) -> float:
    """Mean active MLP experts (the same in all layers) that give a number of active parameters.

    All attention experts are taken as active, as in the paper's TopK policy.

    Args:
        config: a DSMoEConfig, or any object with its attributes.
        active_non_embedding: the active parameters to meet.
        count_router: whether they include the routers.
    """
    sizes = layer_sizes(config)
    always = sizes.attention + sizes.norm + (sizes.router if count_router else 0)
    per_layer = (active_non_embedding - config.hidden_size) / config.num_hidden_layers
    return (per_layer - always) / (sizes.mlp / sizes.num_experts)


def compare_with_paper(model: PaperModel, config: Any) -> Comparison:
    """Compare our counts of a config with the paper's row.

    The active counts of the dense models and SMoEs follow from the config. Those of the DS-MoEs depend on
    measured means that the paper does not print, and two unknowns (active attention and MLP experts) meet one
    number: we take all attention experts as active and SOLVE for the MLP experts, so nothing is confirmed by
    the agreement.

    Args:
        model: the paper's row.
        config: a DSMoEConfig, or any object with its attributes.
    """
    fitted = config.kind == "dsmoe"
    target = model.active * MILLION
    experts = config.num_experts
    if fitted:
        mean = solve_mean_active_mlp_experts(config, target, count_router=True)
        other = solve_mean_active_mlp_experts(config, target, count_router=False)
        counts = count_parameters(config, {"mlp": [mean] * config.num_hidden_layers})
        assumption = (
            f"fitted: all attention experts, router counted, so {mean:.2f} of {experts} MLP experts "
            f"(router not counted: {other:.2f})"
        )
        active = counts.active_non_embedding
    else:
        counts = count_parameters(config)
        mean = counts.layers[0].mlp_active_experts
        active = counts.active_non_embedding - (0 if model.router_counted else counts.router)
        other = counts.active_non_embedding - (counts.router if model.router_counted else 0)
        assumption = "all parameters"
        if config.kind == "smoe":
            counted, not_counted = (
                ("counted", "not counted") if model.router_counted else ("not counted", "counted")
            )
            assumption = (
                f"top-{mean:.0f} of {experts} MLP experts, router {counted} "
                f"({not_counted}: {other / MILLION:.0f}M, {other / target - 1:+.1%})"
            )
    return Comparison(
        name=model.name,
        paper_total=int(model.total * MILLION),
        total=counts.non_embedding,
        paper_active=int(target),
        active=active,
        fitted=fitted,
        mean_active_mlp_experts=mean,
        assumption=assumption,
    )


def compare_all(configs: Mapping[str, Any]) -> list[Comparison]:
    """`compare_with_paper` for the nine models.

    Args:
        configs: config by the stem of its YAML (`PaperModel.file`).

    Raises:
        UserError: one is missing.
    """
    missing = [model.file for model in PAPER_MODELS if model.file not in configs]
    if missing:
        raise UserError(
            f"no config for {missing[0]!r}; the nine are {', '.join(m.file for m in PAPER_MODELS)}"
        )
    return [compare_with_paper(model, configs[model.file]) for model in PAPER_MODELS]


def comparison_table(comparisons: list[Comparison]) -> str:
    """The comparisons as a Markdown table, parameters in millions without embeddings."""
    header = (
        "model",
        "total, paper",
        "ours",
        "diff.",
        "active, paper",
        "ours",
        "diff.",
        "assumption (active)",
    )
    rows = [
        (
            row.name,
            f"{row.paper_total / MILLION:.0f}",
            f"{row.total / MILLION:.1f}",
            f"{row.total_difference:+.2%}",
            f"{row.paper_active / MILLION:.0f}",
            f"{row.active / MILLION:.1f}",
            "fitted" if row.fitted else f"{row.active_difference:+.2%}",
            row.assumption,
        )
        for row in comparisons
    ]
    return markdown_table(header, rows, left=(0, 7))
