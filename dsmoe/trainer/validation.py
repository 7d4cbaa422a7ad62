"""Validation during training: all experts, and at the evaluation policy with the experts that it keeps."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from dsmoe.model import model_inputs, use_routing


@torch.no_grad()
def mean_loss(accelerator: Accelerator, model: Any, batches: Iterable[dict[str, Tensor]]) -> float:
    """Language-modelling loss in nats per token; the batches are split over processes."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for index, batch in enumerate(batches):
        if index % accelerator.num_processes != accelerator.process_index:
            continue
        batch = {key: value.to(accelerator.device) for key, value in batch.items()}
        labels = batch["shift_labels"]
        with accelerator.autocast():
            logits = model(**model_inputs(batch), use_cache=False).logits
        losses = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        total += torch.stack([losses.double(), (labels != -100).sum().double()])
    model.train()
    total = accelerator.reduce(total, reduction="sum")
    return float(total[0] / total[1].clamp(min=1))


def validate(
    accelerator: Accelerator, model: Any, batches: list, sparse_policy: dict | None
) -> dict[str, float]:
    """Validation losses.

    Args:
        accelerator: of the run.
        model: unwrapped.
        batches: of `evaluation_batches`.
        sparse_policy: MLP policy for a second pass; None: only the model's own policy.

    Returns:
        "validation_loss" and, with a sparse policy, "validation_loss_sparse".
    """
    found = {"validation_loss": mean_loss(accelerator, model, batches)}
    if sparse_policy is not None:
        with use_routing(model, mlp=sparse_policy):
            found["validation_loss_sparse"] = mean_loss(accelerator, model, batches)
    return found
