"""`calibrate`: from a checkpoint and calibration text to its frontier of sparse models."""

from collections.abc import Sequence

from torch import Tensor

from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM
from dsmoe.sparsify.allocation import Allocation
from dsmoe.sparsify.compare import Comparer, reference_policies
from dsmoe.sparsify.damage import Curve
from dsmoe.sparsify.families import ALLOCATED, DEFAULT, GLOBAL, SCORES, check_family, levels
from dsmoe.sparsify.search import Frontier
from dsmoe.sparsify.sites import COSTS, find_sites, output_norms

CURVE_TOKENS = 8192


def calibrate(
    model: DSMoEForCausalLM,
    batches: Sequence[dict[str, Tensor]],
    *,
    family: str = "auto",
    score: str = "gate",
    cost: str = "parameters",
    context_length: int = 256,
    curve_tokens: int = CURVE_TOKENS,
    progress: bool = False,
) -> Frontier:
    """Prepare to sparsify a model; what removing experts costs is measured, layer by layer, at the first need.

    Args:
        model: in evaluation mode, with the policies of its reference in the config (a DS-MoE: all experts; an SMoE:
            its trained K).
        batches: calibration text, as of `dsmoe.sparsify.calibration`.
        family: "auto", or one of `ALLOCATED` or `GLOBAL` in `dsmoe.sparsify.families`.
        score: "gate", or "gate_norm": gate times the mean norm of the expert's output.
        cost: what a share is a share of: the "parameters" of the experts, or their "flops" per token.
        context_length: tokens of context, for FLOPs of attention experts.
        curve_tokens: damage curves are measured on about so many tokens; whole models on all.
        progress: show bars.

    Returns:
        A Frontier: `.at_share(0.25)`, `.within(0.005)`.

    Raises:
        UserError: a model without experts, an unknown family, or one that the model has no experts for.
    """
    if model.config.num_experts == 1 and model.config.num_attention_experts == 1:
        raise UserError("the model has no experts; there is nothing to sparsify")
    family = DEFAULT if family == "auto" else family
    for name, value, known in (
        ("family", family, (*ALLOCATED, *GLOBAL)),
        ("score", score, SCORES),
        ("cost", cost, COSTS),
    ):
        if value not in known:
            raise UserError(f"{name} {value!r}: must be one of {', '.join(known)}")
    check_family(family, model.config.num_experts > 1)
    reference = reference_policies(model)
    comparer = Comparer(model, batches, reference, progress="reference" if progress else None)
    first, tokens = 0, 0
    while first < len(batches) and tokens < curve_tokens:
        tokens += int((batches[first]["shift_labels"] != -100).sum())
        first += 1
    part = comparer if first == len(batches) else Comparer(model, batches[:first], reference)
    sites = find_sites(model, part.batches, reference, cost, context_length)
    if score == "gate_norm":
        for site, weights in zip(sites, output_norms(model, part.batches[:1], sites, reference)):
            site.weights = weights
    own = family if family in ALLOCATED else DEFAULT  # for the range of shares alone
    curves = [Curve(site, levels(site, own)) for site in sites]
    return Frontier(comparer, part, Allocation(curves, reference), family, progress)
