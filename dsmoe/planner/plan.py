"""The plan: candidates sized to the limits, ranked by loss, with everything that makes the ranking doubtful."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dsmoe.errors import UserError
from dsmoe.planner.lawfile import PlanningLaw
from dsmoe.planner.limits import Limits
from dsmoe.planner.memory import training_parts
from dsmoe.planner.optimum import Optimum, nearest_shape, optimise, too_small
from dsmoe.planner.recipe import batch_tokens, learning_rate, recipe_notes
from dsmoe.planner.shapes import LAW_VOCAB_SIZE, Family
from dsmoe.planner.stability import decision_shares
from dsmoe.planner.units import format_count

SMOE_EXPERTS = (2, 4, 8, 16, 32)
DSMOE_EXPERTS = 32
ACTIVE_SHARE = 0.33
SMALLEST = 0.75  # an optimum below this share of the smallest hidden size is said to be out of reach


@dataclass(frozen=True)
class Row:
    """One candidate at its best real shape.

    Args:
        family: kind and number of experts.
        continuous: exact optimum over real hidden sizes.
        real: the nearest shape that can be built and keeps the limits; everything printed belongs to it.
        fields: the JSON row.
    """

    family: Family
    continuous: Optimum
    real: Optimum
    fields: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A ranked plan.

    Args:
        rows: best first.
        impossible: candidates that no shape keeps within the limits, with the reason.
        limits: what was asked.
        law: what it rests on.
        notes: sentences that belong beside the table.
    """

    rows: list[Row]
    impossible: list[dict[str, Any]]
    limits: Limits
    law: PlanningLaw
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: rows, impossible, law, limits, assumptions."""
        term = self.law.fit.term
        return {
            "rows": [row.fields for row in self.rows],
            "impossible": self.impossible,
            "law": {
                "name": self.law.name,
                "rmse": self.law.rmse,
                "tie_band": self.law.tie_band,
                "range": {name: list(ends) for name, ends in self.law.fitted_range.items()},
                "bootstrap_draws": len(self.law.draws),
                "eta": term.eta if self.law.fit.kappa is None else None,
                "kappa": self.law.fit.kappa,
                "eta_fitted": term.fitted,
            },
            "limits": asdict(self.limits),
            "assumptions": self.notes,
        }


def candidate_families(
    law: PlanningLaw,
    num_experts: Sequence[int] | None = None,
    active_share: float = ACTIVE_SHARE,
    vocab_size: int | None = None,
    kinds: Sequence[str] = ("dense", "smoe", "dsmoe"),
) -> list[Family]:
    """Dense, SMoE and DS-MoE candidates.

    Args:
        law: leaves out the numbers of experts that it has no entry for, unless they are asked for by name.
        num_experts: of SMoE and DS-MoE, those above 1; None: 2 to 32 for SMoE, 32 for DS-MoE.
        active_share: mean share of MLP experts that a DS-MoE runs.
        vocab_size: entries of each embedding table; None: as the law's runs had, or those of the published law.
        kinds: which kinds to consider.

    Raises:
        UserError: no candidate is left, or the law can't say anything about one that was asked for.
    """
    known, vocab_size = law.known_experts, vocab_size or law.vocab_size or LAW_VOCAB_SIZE
    if num_experts is None:
        smoe: Sequence[int] = [count for count in SMOE_EXPERTS if known is None or count in known]
        dsmoe: Sequence[int] = (DSMOE_EXPERTS,)
    else:  # with one expert either is the dense model, which stands there by itself
        smoe = dsmoe = [count for count in num_experts if count > 1]
    made = [Family("dense", vocab_size=vocab_size)] if "dense" in kinds else []
    if "smoe" in kinds:
        for count in smoe:
            law.fit.law.at(count)
            made.append(Family("smoe", count, vocab_size=vocab_size))
    if "dsmoe" in kinds:
        made += [Family("dsmoe", count, active_share, vocab_size) for count in dsmoe]
    if not made:
        raise UserError(
            f"no candidate is left of kinds {', '.join(kinds)} with experts {num_experts}; both smoe and dsmoe need at "
            "least 2"
        )
    return made


def make_plan(families: Sequence[Family], limits: Limits, law: PlanningLaw) -> Plan:
    """Size every candidate to the limits and rank them by loss.

    Raises:
        UserError: the limits leave the size or the tokens unbounded, or nothing fits.
    """
    limits.check()
    rows, impossible = [], []
    for family in families:
        loss = law.fit.sized_loss(family)
        continuous = optimise(family, loss, limits)
        real = None if continuous is None else nearest_shape(family, loss, limits, continuous)
        if continuous is None or real is None:
            reason = _why_impossible(family, limits)
            impossible.append({"kind": family.kind, "num_experts": family.num_experts, "reason": reason})
        else:
            rows.append(Row(family, continuous, real, _fields(family, continuous, real, limits, law)))
    if not rows:
        raise UserError(f"no model keeps the limits: {impossible[0]['reason']}")
    rows.sort(key=lambda row: (row.real.loss, row.fields["memory_bytes"]))
    best = rows[0].real.loss
    shares = decision_shares([row.family for row in rows], limits, law)
    for row, share in zip(rows, shares):
        row.fields["loss_gap"] = row.real.loss - best
        row.fields["tie"] = row.fields["loss_gap"] <= law.tie_band
        row.fields.update(share)
    return Plan(rows, impossible, limits, law, _notes(limits, law, rows))


def _fields(
    family: Family, continuous: Optimum, real: Optimum, limits: Limits, law: PlanningLaw
) -> dict[str, Any]:
    """The JSON row; `loss_gap`, `tie` and the decision's stability are filled in once all rows are known."""
    size = int(real.hidden_size)
    shape, serving = family.shape(size), limits.serving
    active, trained = family.num_params_active(size), family.num_params_trained(size)
    beyond = law.beyond_range(family, size, real.tokens)
    weights, cache = serving.weight_bytes(family, size), serving.kv_cache_bytes(size)
    training = training_parts(family, size, limits.training_recipe)
    return {
        "kind": family.kind,
        "num_experts": family.num_experts,
        "hidden_size": size,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "mean_k": family.mean_k,
        "num_params_active": round(active),
        "num_params_total": round(family.num_params_total(size)),
        "tokens": real.tokens,
        "tokens_per_param": real.tokens / trained,
        "learning_rate": learning_rate(family, size),
        "batch_tokens": batch_tokens(real.tokens),
        "recipe_notes": recipe_notes(family, size, real.tokens),
        "loss": real.loss,
        "loss_interval": law.interval(family, trained, real.tokens),
        "loss_gap": 0.0,
        "tie": False,
        "extrapolated": bool(beyond),
        "extrapolated_in": beyond,
        "assumed": family.kind == "dsmoe" and not law.fit.term.fitted,
        "memory_bytes": round(weights + cache),
        "memory": {"weights": round(weights), "kv_cache": round(cache)},
        "training_memory_bytes": round(sum(training.values())),
        "training_memory": {part: round(size_) for part, size_ in training.items()},
        "training_flops": 6 * trained * real.tokens,
        "inference_flops": 2 * active * limits.inference_tokens,
        "inference_flops_per_token": 2 * active,
        "binding": list(real.binding),
        "continuous": {
            "hidden_size": continuous.hidden_size,
            "num_params_active": family.num_params_active(continuous.hidden_size),
            "num_params_total": family.num_params_total(continuous.hidden_size),
            "tokens": continuous.tokens,
            "loss": continuous.loss,
        },
    }


def _why_impossible(family: Family, limits: Limits) -> str:
    if limits.total_params is not None and too_small(family, limits.total_params):
        smallest = format_count(family.num_params_total(family.step))
        return (
            f"{family.name} of {limits.total_params:.4g} total parameters can't be built that small; the smallest, of "
            f"d = {family.step}, has {smallest} (a smaller --vocab-size lowers that)"
        )
    if limits.total_params is not None:
        return f"{family.name} of {limits.total_params:.4g} total parameters is beyond the other limits"
    largest, bound = limits.largest_hidden_size(family)
    return (
        f"{bound} allows {family.name} a hidden size of {largest:.0f}; the smallest shape has {family.step}"
    )


def _notes(limits: Limits, law: PlanningLaw, rows: Sequence[Row]) -> list[str]:
    serving, term = limits.serving, law.fit.term
    counted = "weights of ALL experts"
    if serving.context_length:
        counted += f" and KV cache of {serving.batch_size} x {serving.context_length:,} tokens"
    notes = [
        f"memory counts {counted}, without activations and the runtime's own"
        + ("" if serving.context_length else "; no KV cache, as no --context is given"),
        "layers = heads = d / 64, SwiGLU of 3 d, untied embeddings; SMoE: top-1 of full-size experts",
        "learning rate and batch are rules of thumb from the law's runs",
        f"column training: bytes of weights, gradients and AdamW state ({limits.training_recipe}), without activations",
    ]
    ranks: dict[str, list[str]] = {}
    for rank, row in enumerate(rows, 1):
        for note in row.fields["recipe_notes"]:
            ranks.setdefault(note, []).append(str(rank))
        if row.continuous.hidden_size < SMALLEST * row.family.step:
            note = f"the optimum lies below the smallest shape (d = {row.family.step}), which is taken"
            ranks.setdefault(note, []).append(str(rank))
    for note, which in ranks.items():
        notes.append(f"{'all rows' if len(which) == len(rows) else 'rank ' + ', '.join(which)}: {note}")
    if any(row.family.kind == "dsmoe" for row in rows):
        origin = "fitted on own runs" if term.fitted else "ASSUMED, not measured; set it with --eta or fit it"
        kappa = law.fit.kappa
        eta = f"{term.eta:g}" if kappa is None else f"N ** {-kappa:.3g}"
        notes.append(
            f"DS-MoE: loss = dense law at eta x N_total, eta = {eta} ({origin}); training costs 6 N_total per token"
        )
    if limits.inference_tokens and limits.flops is None:
        notes.append(
            "inference tokens are reported as operations only: without --flops they share no budget with training"
            + (", and --days is for training alone" if limits.training_flops else "")
        )
    return notes
