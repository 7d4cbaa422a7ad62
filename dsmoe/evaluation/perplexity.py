"""Validation loss: mean negative log-likelihood of held-out tokens."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

IGNORED = -100
_CHUNK_ENTRIES = 1 << 24  # float32 copies of logits are kept below 64 MiB


def validation_loss(
    model: Any, batches: Iterable[Mapping[str, torch.Tensor]], bytes_per_token: float | None = None
) -> dict[str, Any]:
    """Mean loss of a causal language model over batches.

    Args:
        model: any causal language model of transformers.
        batches: dicts with `input_ids` [B, S], `shift_labels` [B, S] (the token after each position; -100
            where there is none to predict) and optionally `attention_mask` and `position_ids` [B, S], as
            `dsmoe.data.loader.evaluation_batches` yields.
        bytes_per_token: mean UTF-8 bytes of text per predicted token, for bits per byte.

    Returns:
        {"loss": nats per token (null without any token), "num_tokens": predicted tokens, "bits_per_byte":
        null without `bytes_per_token`}. Cross-entropies are taken in float32 and summed in float64.
    """
    total, num_tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                inputs = {name: value.to(model.device) for name, value in batch.items()}
                labels = inputs.pop("shift_labels")
                loss, count = summed_cross_entropy(model(**inputs, use_cache=False).logits, labels)
                total, num_tokens = total + loss, num_tokens + count
    finally:
        model.train(training)
    loss_per_token = total / num_tokens if num_tokens else None
    bits = None
    if loss_per_token is not None and bytes_per_token:
        bits = loss_per_token / math.log(2) / bytes_per_token
    return {"loss": loss_per_token, "num_tokens": num_tokens, "bits_per_byte": bits}


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Sum of cross-entropies and the number of labels in it.

    Args:
        logits: [B, S, V], any dtype.
        labels: [B, S], -100 where a position does not count.

    Returns:
        Sum in nats (float32 cross-entropies, summed in float64), and the count of labels.
    """
    logits_TV, labels_T = logits.flatten(0, -2), labels.flatten()
    kept = labels_T != IGNORED
    total = 0.0
    chunk = max(1, _CHUNK_ENTRIES // logits_TV.shape[-1])
    for start in range(0, len(labels_T), chunk):
        part = slice(start, start + chunk)
        if not bool(kept[part].any()):
            continue
        losses = torch.nn.functional.cross_entropy(
            logits_TV[part].float(), labels_T[part], ignore_index=IGNORED, reduction="none"
        )
        total += losses.double().sum().item()
    return total, int(kept.sum())
