"""The sparse checkpoint: the model with its policies in the config, and sparsity.json beside it."""

import json
import math
from pathlib import Path
from typing import Any

from dsmoe.accounting import count_parameters, inference_flops_per_token
from dsmoe.checkpoint.pretrained import DTYPES, write_pretrained
from dsmoe.environment import versions
from dsmoe.files import new_folder, write_json
from dsmoe.model import DSMoEForCausalLM
from dsmoe.sparsify.measure import ActiveExperts

REPORT = "sparsity.json"


def sparsity_report(
    model: DSMoEForCausalLM, active: ActiveExperts | None, context_length: int
) -> dict[str, Any]:
    """What the model's policies cost.

    Args:
        model: with its policies set.
        active: measured on text; None where the policies fix the counts.
        context_length: tokens of context for the attention's FLOPs.

    Returns:
        JSON-able: policies, stored and active parameters, active shares, FLOPs per token, and per layer the mean,
        median and 95th percentile of active experts (null where not measured).
    """
    config = model.config
    means = None
    if active is not None:
        means = {part: active.mean(part) for part in active.counts}
    counts = count_parameters(config, means)
    layers = []
    for layer in range(config.num_hidden_layers):
        row: dict[str, Any] = {"layer": layer}
        for part in ("mlp", "attention"):
            row[part] = _layer_row(config, active, part, layer)
        layers.append(row)
    return {
        "policy": {"mlp": config.mlp_routing, "attention": config.attention_routing},
        "num_params_total": counts.total,
        "num_params_active": round(counts.active),
        "mlp_active_fraction": counts.mlp_active_fraction,
        "attention_active_fraction": counts.attention_active_fraction,
        "flops_per_token": inference_flops_per_token(config, context_length, means),
        "context_length": context_length,
        "num_experts": config.num_experts,
        "num_attention_experts": config.num_attention_experts,
        "per_layer": layers,
        "measured_tokens": None if active is None else active.num_tokens,
        "measured_loss": None if active is None else active.loss,
        "versions": versions(),
    }


def _layer_row(config: Any, active: ActiveExperts | None, part: str, layer: int) -> dict[str, Any] | None:
    if (config.num_experts if part == "mlp" else config.num_attention_experts) == 1:
        return None
    if active is None or part not in active.counts:
        return {"policy": config.routing(part, layer), "mean": None, "p50": None, "p95": None}
    return {
        "policy": config.routing(part, layer),
        "mean": round(active.mean(part)[layer], 4),
        "p50": active.percentile(part, 0.5)[layer],
        "p95": active.percentile(part, 0.95)[layer],
        "expert_share": [
            round(float(use) / max(1, active.num_tokens), 5) for use in active.uses[part][layer]
        ],
    }


def write_sparse(
    model: DSMoEForCausalLM,
    report: dict[str, Any],
    output: Path,
    tokenizer_dir: Path,
    overwrite: bool = False,
    dtype: str = "float32",
) -> None:
    """Write the checkpoint and its report as one folder that appears whole.

    Args:
        model: with its policies set; its weights are cast to `dtype` in place.
        report: of `sparsity_report`.
        output: folder to write.
        tokenizer_dir: folder whose tokenizer files go along.
        overwrite: replace a folder that is not empty.
        dtype: of the weights that are written, one of DTYPES.

    Raises:
        UserError: the folder is not empty and `overwrite` is false.
    """
    with new_folder(output, overwrite=overwrite) as beside:
        # the model has no buffers that a cast would spoil
        write_pretrained(model.to(DTYPES[dtype]), beside, tokenizer_dir)  # type: ignore[arg-type]
        write_json(beside / REPORT, report)


def human_report(report: dict[str, Any]) -> str:
    """The report as a few lines and a table."""
    lines = [
        f"stored parameters  {report['num_params_total']:>14,}",
        f"active parameters  {report['num_params_active']:>14,}  "
        f"({report['num_params_active'] / report['num_params_total']:.1%}; MLP experts "
        f"{report['mlp_active_fraction']:.1%}, attention {report['attention_active_fraction']:.1%})",
        f"FLOPs per token    {report['flops_per_token']:>14,.0f}  (at {report['context_length']} tokens of context)",
    ]
    if report["measured_loss"] is not None:
        lines.append(
            f"loss on the text   {report['measured_loss']:>14.4f}  nats/token over {report['measured_tokens']:,}"
        )
    lines += _calibration_lines(report)
    lines.append("layer  part       policy                                             mean   p50   p95")
    for row in report["per_layer"]:
        for part in ("mlp", "attention"):
            if row[part] is None:
                continue
            cells = row[part]
            numbers = (
                "  (fixed)"
                if cells["mean"] is None
                else f"{cells['mean']:6.2f} {cells['p50']:5d} {cells['p95']:5d}"
            )
            lines.append(f"{row['layer']:5d}  {part:9s}  {_short(cells['policy']):48s} {numbers}")
    return "\n".join(lines)


def _calibration_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    found = report.get("calibration")
    if found is not None:
        error = found["standard_error"]
        error = "unknown (a single document)" if error is None else f"{error:.5f}"
        ranked = "keeps all experts" if found["score"] is None else f"score: {found['score']}"
        lines = [
            f"family             {found['family']:>21}  ({ranked})",
            f"loss increase      {found['loss_increase']:>14.5f}  nats/token, standard error {error}, "
            "against the checkpoint as it was",
            f"active experts     {found['active_share']:>14.1%}  of all experts, by their cost",
        ]
        if found["hint"] is not None:
            lines.append(f"hint: {found['hint']}")
    removed = report.get("removed_experts")
    if removed is not None:
        lines.append(f"removed experts    {removed['num_removed']:>14,}")
    return lines


def without_infinities(value: Any) -> Any:
    """A report in which None stands for every number that JSON has no word for (the standard error of one document)."""
    if isinstance(value, dict):
        return {key: without_infinities(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(policy: dict[str, Any]) -> str:
    """A policy in one line; lists by their length."""
    shown = {
        key: f"{len(value)} numbers" if isinstance(value, list) else value for key, value in policy.items()
    }
    return json.dumps(shown)
