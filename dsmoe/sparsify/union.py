"""The union of experts over chunks of tokens: what a batch of tokens reads from memory.

A single token reads its own experts; tokens that run together read each expert that any of them keeps. Chunks are
consecutive tokens of a window, as in prefill, or as in a batch of requests on the same subject.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmoe.model import DSMoEForCausalLM
from dsmoe.model.routing import keep_experts
from dsmoe.sparsify.compare import Policies, with_policies
from dsmoe.sparsify.suffix import fast_masking, run_layers

CHUNKS = (1, 8, 64)


def union_size(kept_BSN: Tensor, chunk: int) -> Tensor:
    """Mean number of distinct experts over chunks of consecutive tokens; tokens after the last whole chunk are left out.

    Args:
        kept_BSN: [B, S, N] bool, the experts each token keeps.
        chunk: tokens of a chunk, at most S.

    Returns:
        A float64 scalar.
    """
    whole = kept_BSN.shape[1] // chunk * chunk
    chunks = kept_BSN[:, :whole].unflatten(1, (-1, chunk))
    return chunks.any(2).sum(-1).double().mean()


@torch.inference_mode()
def unions(
    model: DSMoEForCausalLM,
    batches: Sequence[dict[str, Tensor]],
    policies: Policies,
    chunks: Sequence[int] = CHUNKS,
) -> dict[str, dict[str, list[float]]]:
    """Mean number of distinct experts in chunks of tokens, per layer.

    Args:
        model: a dsmoe model in evaluation mode.
        batches: whole windows without padding, as of `dsmoe.sparsify.calibration.sample_corpus`.
        policies: {"mlp": one per layer, "attention": ...}.
        chunks: numbers of tokens.

    Returns:
        {part: {str(chunk): one mean per layer}}; parts without a router are absent.
    """
    config: Any = model.config
    totals: dict[str, dict[str, Tensor]] = {}
    with with_policies(model, policies), fast_masking(model):
        for batch in batches:
            for part, per_layer in run_layers(model, batch).router_logits.items():
                kept = [
                    keep_experts(
                        logits.flatten(0, 1).softmax(-1),
                        config.routing(part, layer),
                        config.kept_experts(part, layer),
                    ).unflatten(0, logits.shape[:2])
                    for layer, logits in enumerate(per_layer)
                ]
                sums = totals.setdefault(part, {})
                for chunk in chunks:
                    if chunk > kept[0].shape[1]:
                        continue
                    sizes = torch.stack([union_size(layer, chunk) for layer in kept])
                    sums[str(chunk)] = sums.get(str(chunk), torch.zeros_like(sizes)) + sizes
    return {
        part: {chunk: (sizes / len(batches)).tolist() for chunk, sizes in sums.items()}
        for part, sums in totals.items()
    }
