"""A budget or a bound on quality to the policies of a model: what `dsmoe sparsify` does without --policy."""

import argparse
from typing import Any

from dsmoe.accounting import inference_flops_per_token
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, set_routing
from dsmoe.sparsify.calibrate import calibrate
from dsmoe.sparsify.calibration import CalibrationText
from dsmoe.sparsify.compare import Comparison
from dsmoe.sparsify.families import MET, score_of
from dsmoe.sparsify.search import TOLERANCE, Candidate, Frontier
from dsmoe.sparsify.sites import expert_cost
from dsmoe.sparsify.unused import remove_unused
from dsmoe.sparsify.write import sparsity_report

# nats per token; as much as a third of the experts costs a model that is trained for it, with many tokens
# (eval/records/quality-tokens-tiny)
_DEAR = 0.02


def calibrated(args: argparse.Namespace, model: DSMoEForCausalLM, text: CalibrationText) -> dict[str, Any]:
    """Find and set the policies that the arguments ask for.

    Args:
        args: of `dsmoe sparsify`, with one goal.
        model: its policies are set, and unused experts removed.
        text: to calibrate on.

    Returns:
        The report.

    Raises:
        UserError: a budget or bound that can't be met, with the best value that can.
    """
    frontier = calibrate(
        model, text.batches, family=args.family, score=args.score, context_length=args.sequence_length, progress=True,
        cost="parameters" if args.max_flops_per_token is None else "flops",
    )  # fmt: skip
    # --family by hand means that one alone
    family = None if args.family == "auto" else frontier.family
    found = _found(args, model, frontier, family)
    for part in ("mlp", "attention"):
        if any(site.part == part for site in frontier.sites):
            set_routing(model, part, found.policies[part])
    comparison, removed = found.comparison, None
    if args.remove_unused is not None:
        removed = remove_unused(model, comparison.active, args.remove_unused)
        if removed["num_removed"]:
            comparison = frontier.comparer(found.policies, progress="measuring")
    report = sparsity_report(model, comparison.active, args.sequence_length)
    share = found.share if removed is None else frontier.allocation.share(comparison.active)
    if removed is not None:
        _check_removal(args, comparison, report["flops_per_token"], share, found.share)
    report["removed_experts"] = removed
    report["calibration"] = {
        "asked": {
            "max_loss_increase": args.max_loss_increase,
            "target_active": args.target_active,
            "max_flops_per_token": args.max_flops_per_token,
            "score": args.score,
        },
        "text": text.description,
        "score": score_of(found.policies),  # what was chosen may rank by less than was asked for, or keep all
        "family": found.family,
        "active_share": share,
        **comparison.as_dict(),
        "hint": _hint(model, comparison),
        "frontier": frontier.describe(),
    }
    return report


def _hint(model: DSMoEForCausalLM, comparison: Comparison) -> str | None:
    """What training could do about a dear share; an SMoE is trained with the one that it has."""
    if model.config.kind == "smoe" or comparison.loss_increase <= _DEAR:
        return None
    return (
        f"above {_DEAR:g} nats per token such a share is cheaper trained than found: a mask phase for it "
        "(mask_phase.fraction 0.4 to 0.7, mask_phase.target_active), or dsmoe polish"
    )


def _check_removal(
    args: argparse.Namespace, comparison: Comparison, flops: float, share: float, found: float
) -> None:
    """Refuse a removal of experts that breaks the bound or the budget, within which the search had stayed."""
    bound, most, target = args.max_loss_increase, args.max_flops_per_token, args.target_active
    # from what was found for the target, which of whole Ks may be far below it
    if target is not None and abs(share - found) > MET:
        raise UserError(
            f"--remove-unused {args.remove_unused:g} shifts the routing: {share:.4g} of all experts are active, and "
            f"--target-active is {target:g}; use a smaller share"
        )
    if bound is not None and comparison.upper > bound:
        raise UserError(
            f"--remove-unused {args.remove_unused:g} raises the loss by {comparison.loss_increase:.5f} "
            f"(standard error {comparison.standard_error:.5f}), above the bound of {bound:g}; use a smaller share"
        )
    # later layers may choose more experts then; a sum in another order is no excess
    if most is not None and flops > most * (1 + 1e-6):
        raise UserError(
            f"--remove-unused {args.remove_unused:g} shifts the routing: {flops:.6g} FLOPs per token, above the "
            f"{most:.6g} of --max-flops-per-token; use a smaller share"
        )


def _found(
    args: argparse.Namespace, model: DSMoEForCausalLM, frontier: Frontier, family: str | None
) -> Candidate:
    if args.max_loss_increase is not None:
        return frontier.within(args.max_loss_increase, family)
    if args.target_active is not None:
        return frontier.at_share(args.target_active, family)
    return _within_flops(args, model, frontier, family)


def _within_flops(
    args: argparse.Namespace, model: DSMoEForCausalLM, frontier: Frontier, family: str | None
) -> Candidate:
    """The least damage at a number of FLOPs per token; never above it."""
    total, fixed = frontier.allocation.total, fixed_flops(model, frontier, args.sequence_length)
    most = share = (args.max_flops_per_token - fixed) / total
    if share >= frontier.reference_share:
        share = frontier.reference_share
    elif share < frontier.allocation.least:
        least = fixed + frontier.allocation.least * total
        raise UserError(
            f"--max-flops-per-token {args.max_flops_per_token:g} can't be met: with one expert per layer and token it is "
            f"{least:.4g} ({fixed:.4g} of them outside the experts)"
        )
    else:
        # measured shares are met within the tolerance; FLOPs must not be above
        share = max(frontier.allocation.least, share - TOLERANCE)
    try:
        return frontier.at_share(share, family, at_most=most)
    except UserError as error:
        raise UserError(f"--max-flops-per-token {args.max_flops_per_token:g}: {error}") from None


def fixed_flops(model: DSMoEForCausalLM, frontier: Frontier, context_length: int) -> float:
    """FLOPs per token that don't depend on how many experts are active."""
    means: dict[str, list[float]] = {}
    for site in frontier.sites:
        means.setdefault(site.part, []).append(site.reference_count)
    flops = inference_flops_per_token(model.config, context_length, means)
    for site in frontier.sites:
        flops -= site.reference_count * expert_cost(model.config, site.part, "flops", context_length)
    return flops
