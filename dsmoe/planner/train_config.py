"""A row of the plan as a configuration that `train/pretrain.py --config` accepts."""

import math
from pathlib import Path
from typing import Any

import yaml

from dsmoe.files import write_text
from dsmoe.planner.plan import Plan, Row
from dsmoe.planner.recipe import SEQUENCE_LENGTH

ROUTER_LOSS = {
    "dense": {},
    "smoe": {"load_balancing_coef": 0.01},
    "dsmoe": {"router_mi_loss_coef_mlp": 1.0e-3, "load_balancing_coef": 0.01},
}
# tokens a parameter -> share of the steps that run sparsely: the two places where it was measured (eval/quality.md)
MASK_PHASES = {2.9: 0.4, 20.0: 0.7}


def mask_phase_fraction(tokens_per_param: float) -> float:
    """The share of the steps for a DS-MoE's mask phase: that of the nearer measured place, by ratio.

    Args:
        tokens_per_param: training tokens a parameter, of all parameters.
    """
    nearest = min(MASK_PHASES, key=lambda measured: abs(math.log(measured / tokens_per_param)))
    return MASK_PHASES[nearest]


def training_config(row: Row, context_length: int = 0) -> dict[str, Any]:
    """The configuration's sections as a dict.

    Args:
        row: the row to train.
        context_length: longest context that the model is to serve.
    """
    fields, kind = row.fields, row.family.kind
    model: dict[str, Any] = {
        "kind": kind,
        "vocab_size": row.family.vocab_size,
        "hidden_size": fields["hidden_size"],
        "intermediate_size": fields["intermediate_size"],
        "num_hidden_layers": fields["num_layers"],
        "num_experts": fields["num_experts"],
        "num_attention_heads": fields["num_heads"],
        "tie_word_embeddings": False,
        "max_position_embeddings": max(SEQUENCE_LENGTH, context_length),
    }
    if kind == "smoe":
        # Switch: the one kept expert is scaled by its probability
        model |= {"mlp_gate_scale": 1.0, "mlp_routing": {"policy": "top_k", "k": 1}}
    if kind == "dsmoe":  # routers and their losses are those of configs/recipe/dsmoe.yaml
        model |= {"gate_normalization": "l2", "router_initializer_range": 0.01}
    config: dict[str, Any] = {
        "name": f"plan-{kind}-{fields['num_experts']}-d{fields['hidden_size']}",
        "model": model,
        "data": {"sequence_length": SEQUENCE_LENGTH},
        "optim": {
            "learning_rate": float(f"{fields['learning_rate']:.3g}"),
            "schedule": "wsd",
            "decay_fraction": 0.2,
        },
    }
    if ROUTER_LOSS[kind]:
        config["router_loss"] = dict(ROUTER_LOSS[kind])
    if kind == "dsmoe" and fields["num_experts"] > 1:
        # rounding must not take it below one expert, which the trainer refuses
        target = max(round(row.family.active_share, 4), 1 / fields["num_experts"])
        fraction = mask_phase_fraction(fields["tokens"] / fields["num_params_total"])
        config["mask_phase"] = {"fraction": fraction, "target_active": target}
    sequences = fields["batch_tokens"] // SEQUENCE_LENGTH
    config["train"] = {
        "output_dir": f"runs/{config['name']}",
        "total_tokens": round(fields["tokens"]),
        "global_batch_size": sequences,
        "micro_batch_size": min(4, sequences),  # both are powers of two
        "precision": "bf16",
    }
    return config


def config_text(plan: Plan, rank: int) -> str:
    """The configuration of the row of that rank (1: the best) as YAML, with comments."""
    row, context_length = plan.rows[rank - 1], plan.limits.serving.context_length
    fields = row.fields
    marks = [
        word for word, on in (("extrapolated", fields["extrapolated"]), ("assumed", fields["assumed"])) if on
    ]
    header = [
        f"# {row.family.name}, rank {rank} of a plan by `dsmoe plan`; law: {plan.law.name}.",
        f"# Predicted loss {fields['loss']:.4f} nats per token, not measured ({', '.join(marks) or 'in range'}).",
        "# Learning rate, batch and router losses are starting points. Give the text with --data.path FOLDER.",
        *(f"# NOTE: {note}." for note in (*fields["recipe_notes"], *_notes(row, context_length))),
    ]
    body = yaml.safe_dump(training_config(row, context_length), sort_keys=False)
    return "\n".join(header) + "\n" + body


def _notes(row: Row, context_length: int) -> list[str]:
    notes = []
    if row.family.kind == "dsmoe":
        notes.append(
            "L2 gates run in dsmoe, its transformers model and its vLLM plugin only; gate_normalization: softmax, with "
            "router_mi_loss_coef_mlp: 3.0e-3, can be exported to stock formats"
        )
    if context_length > SEQUENCE_LENGTH:
        notes.append(
            f"training reads {SEQUENCE_LENGTH:,} tokens at a time, so positions beyond, up to the {context_length:,} of "
            "--context, are not trained; raise data.sequence_length, or train on at longer ones"
        )
    return notes


def write_config(plan: Plan, rank: int, path: str | Path) -> None:
    """Write `config_text`, atomically."""
    write_text(path, config_text(plan, rank))
