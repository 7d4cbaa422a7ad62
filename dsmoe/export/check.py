"""The check of an export: logits of the folder, loaded afresh, against those of the original.

Both run in float32 arithmetic on the same random tokens. A kept expert is a discrete choice: where a token's k-th
and (k+1)-th expert are tied up to rounding, the two models may keep different ones, and that position and all later
ones of its sequence then differ for a reason that is no fault. So the check reads the routers of both:

- the first place where their kept experts differ must be a tie, up to the tolerance;
- every position before such a place must agree within the tolerance, without exception;
- the median over all positions must agree as well, so that ties hide no general fault.

There the experts run as a plain loop. What transformers does by default is another kernel, which may refuse a shape or a
machine, so the folder is also run that way, in its own dtype, and compared with the loop in that dtype.

Shapes: B sequences, S positions, V vocabulary, L layers, N experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dsmoe.errors import UserError

NUM_SEQUENCES, SEQUENCE_LENGTH = 8, 32


@dataclass(frozen=True)
class Tolerance:
    """What may differ, relative to the norm of a position's logits.

    Attributes:
        median: of all positions.
        largest: of the positions with no tie before them.
    """

    median: float
    largest: float


EXACT = Tolerance(1e-4, 1e-4)
# bfloat16 keeps 8 bits: rounding (of weights after folding, or of sums) moves each number by up to 0.4%, and sharp gates
# amplify that at single positions
ROUNDED = Tolerance(3e-2, 0.3)


@dataclass(frozen=True)
class Outputs:
    """What one model gives: `logits` [B, S, V] and `router_logits` [L, B, S, N] (None without routers)."""

    logits: Tensor
    router_logits: Tensor | None


@dataclass(frozen=True)
class Agreement:
    """How near two models are.

    Attributes:
        max_abs_logit_difference: over all positions.
        median_relative_difference: median over all positions of the norm of the difference over that of the logits.
        max_relative_difference: the largest of them among positions with no tie before them.
        argmax_agreement: share of positions with the same most likely token.
        num_positions: positions compared.
        num_positions_after_tie: those of them at or after a tie that the models broke differently.
        largest_tie: difference of router logits in those ties; 0 where there are none.
    """

    max_abs_logit_difference: float
    median_relative_difference: float
    max_relative_difference: float
    argmax_agreement: float
    num_positions: int
    num_positions_after_tie: int
    largest_tie: float


def check_tokens(vocab_size: int, max_positions: int, seed: int = 0) -> Tensor:
    """Random tokens [B, S] to compare on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        vocab_size, (NUM_SEQUENCES, min(SEQUENCE_LENGTH, max_positions)), generator=generator
    )


@torch.inference_mode()
def outputs_of(model: Any, tokens_BS: Tensor) -> Outputs:
    """Logits and router logits of a model, dsmoe's or a native one."""
    native = hasattr(model.config, "output_router_logits")
    found = model(tokens_BS, use_cache=False, **({"output_router_logits": True} if native else {}))
    routers = getattr(found, "router_logits", None)
    if routers is not None:
        routers = torch.stack([logits.reshape(*tokens_BS.shape, -1).float() for logits in routers])
    return Outputs(found.logits.float(), routers)


def load_exported(
    folder: Path, dtype: torch.dtype = torch.float32, experts: str | None = "eager"
) -> PreTrainedModel:
    """Load an exported folder as a user would, without remote code.

    Args:
        folder: as it was written.
        dtype: of the weights.
        experts: transformers' `experts_implementation`; "eager": the loop, slower than the default (None), but on no
            kernel's word.

    Raises:
        UserError: weights are missing or superfluous.
    """
    options: dict[str, Any] = {"output_loading_info": True}
    if experts is not None:
        options["experts_implementation"] = experts
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, **options
        )
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    model, info = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise UserError(f"the exported folder does not load: {what} {sorted(map(str, info[what]))[:3]}")
    return model.eval()


def check_default_experts(
    folder: Path, dtype: torch.dtype, tokens_BS: Tensor, top_k: int | None
) -> str | None:
    """Run a folder of a stock architecture with experts as transformers runs them by default.

    Args:
        folder: as it was written.
        dtype: of its weights, and of the arithmetic here.
        tokens_BS: to compare on.
        top_k: as in `compare`.

    Returns:
        None, or why that does not run on this machine.

    Raises:
        UserError: it runs, and gives other logits than the loop over experts.
    """
    loop = outputs_of(load_exported(folder, dtype), tokens_BS)
    try:
        default = outputs_of(load_exported(folder, dtype, None), tokens_BS)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    require_agreement(
        compare(loop, default, top_k), EXACT if dtype == torch.float32 else ROUNDED, router_scale(loop)
    )
    return None


def router_scale(outputs: Outputs) -> float:
    """The largest magnitude of the router logits; 0 without routers."""
    return 0.0 if outputs.router_logits is None else outputs.router_logits.abs().max().item()


def compare(original: Outputs, exported: Outputs, top_k: int | None) -> Agreement:
    """Measure how near the outputs are.

    Args:
        original: of the dsmoe model.
        exported: of the folder.
        top_k: experts that a token keeps; None: no discrete choice to compare.
    """
    difference = exported.logits - original.logits
    relative_BS = difference.norm(dim=-1) / original.logits.norm(dim=-1).clamp_min(1e-30)
    after_tie_BS = torch.zeros_like(relative_BS, dtype=torch.bool)
    largest_tie = 0.0
    if top_k is not None and original.router_logits is not None and exported.router_logits is not None:
        after_tie_BS, largest_tie = _different_choices(original.router_logits, exported.router_logits, top_k)
    strict = relative_BS[~after_tie_BS]
    return Agreement(
        max_abs_logit_difference=difference.abs().max().item(),
        median_relative_difference=relative_BS.median().item(),
        max_relative_difference=strict.max().item() if strict.numel() else 0.0,
        argmax_agreement=(exported.logits.argmax(-1) == original.logits.argmax(-1)).float().mean().item(),
        num_positions=relative_BS.numel(),
        num_positions_after_tie=int(after_tie_BS.sum()),
        largest_tie=largest_tie,
    )


def require_agreement(agreement: Agreement, tolerance: Tolerance, router_scale: float) -> None:
    """Refuse an export that is not near enough to its original.

    Args:
        agreement: as measured.
        tolerance: what may differ.
        router_scale: largest magnitude of the original's router logits; a tie is judged relative to it.

    Raises:
        UserError: which quantity is too far off.
    """
    limits = (
        ("largest relative difference of logits", agreement.max_relative_difference, tolerance.largest),
        ("median relative difference of logits", agreement.median_relative_difference, tolerance.median),
        (
            "tie of experts broken differently",
            agreement.largest_tie,
            tolerance.median * max(1.0, router_scale),
        ),
    )
    for what, value, limit in limits:
        if not value <= limit:  # true for NaN as well
            raise UserError(
                f"the export differs from the original and was not written: {what} is {value:.2e}, allowed is "
                f"{limit:.0e} (largest absolute difference {agreement.max_abs_logit_difference:.2e}, same most likely "
                f"token {agreement.argmax_agreement:.1%})"
            )


def _different_choices(original_LBSN: Tensor, exported_LBSN: Tensor, top_k: int) -> tuple[Tensor, float]:
    """Positions [B, S] at or after the first one whose kept experts differ, and the widest gap at such a first place.

    What lies later, or in deeper layers of the same position, has other inputs in the two models and is not judged.
    """
    num_experts = original_LBSN.shape[-1]
    if top_k >= num_experts:
        return torch.zeros(original_LBSN.shape[1:3], dtype=torch.bool), 0.0
    differ_LBS = (_kept(original_LBSN, top_k) != _kept(exported_LBSN, top_k)).any(-1)
    largest = original_LBSN.topk(top_k + 1, dim=-1).values
    gap_LBS = largest[..., -2] - largest[..., -1]
    differ_BS = differ_LBS.any(0)
    widest = 0.0
    for row in differ_BS.any(-1).nonzero().flatten().tolist():
        position = int(differ_BS[row].int().argmax())
        layer = int(differ_LBS[:, row, position].int().argmax())
        widest = max(widest, gap_LBS[layer, row, position].item())
    return differ_BS.cumsum(-1) > 0, widest


def _kept(logits: Tensor, top_k: int) -> Tensor:
    chosen = logits.topk(top_k, dim=-1).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
