"""Thresholds that give wanted shares of active MLP experts on a batch, to start the mask phase with.

Shapes: T tokens, N experts.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsmoe.model import model_inputs
from dsmoe.trainer.step import Batch, Stepper

# bins of log2(N * p) from _LOWEST to log2(N), each less than 1% wide; below it a threshold keeps nearly all
_BINS, _LOWEST = 4096, -20.0


@torch.no_grad()
def first_thresholds(stepper: Stepper, micro_batches: list[Batch], shares: Sequence[float]) -> list[float]:
    """Thresholds on N * p, the same for all layers, in the model's present mode over the global batch.

    Args:
        stepper: of the run.
        micro_batches: this process's part of the batch.
        shares: wanted mean shares of experts, those that are kept as a token's best included.

    Returns:
        A threshold for each share, the same in every process.
    """
    model, accelerator = stepper.parallel.bare(stepper.model), stepper.accelerator
    counts = torch.zeros(_BINS, dtype=torch.float64, device=accelerator.device)
    num_experts = model.config.num_experts
    for batch in micro_batches:
        with accelerator.autocast():
            outputs = model(**model_inputs(batch), use_cache=False, logits_to_keep=1)
        mask_T = batch["attention_mask"].flatten().bool() if "attention_mask" in batch else slice(None)
        for logits in outputs.router_logits:
            counts += histogram(logits.flatten(0, -2)[mask_T].softmax(-1))
    counts = accelerator.reduce(counts, reduction="sum")
    return quantiles(counts, shares, num_experts)


def histogram(probs_TN: Tensor) -> Tensor:
    """[bins] counts of log2(N * p); a token's best expert counts in the highest bin, since every threshold keeps it."""
    width = (math.log2(probs_TN.shape[-1]) - _LOWEST) / _BINS
    # a broken step, which the guard leaves out, must get as far as the guard
    probs_TN = probs_TN.nan_to_num()
    scaled = (probs_TN * probs_TN.shape[-1]).log2()
    bins = ((scaled - _LOWEST) / width).floor().clamp(0, _BINS - 1).long()
    bins.scatter_(-1, probs_TN.argmax(-1, keepdim=True), _BINS - 1)
    return torch.bincount(bins.flatten(), minlength=_BINS).double()


def quantiles(counts: Tensor, shares: Sequence[float], num_experts: int) -> list[float]:
    """The thresholds above which the shares of all counts lie, interpolated within a bin.

    Interpolation makes them nearly independent of how the sum over processes rounds a value at a bin's edge.
    """
    width = (math.log2(num_experts) - _LOWEST) / _BINS
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    found = []
    for share in shares:
        wanted = (1 - share) * float(below[-1])
        edge = int(torch.searchsorted(below, wanted, right=True).clamp(1, _BINS)) - 1
        inside = (wanted - float(below[edge])) / max(1.0, float(counts[edge]))
        found.append(2.0 ** (_LOWEST + width * (edge + min(1.0, inside))))
    return found
