"""Losses of single tokens on held-out text, under policies that the checkpoint needn't have."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dsmoe.model import DSMoEForCausalLM
from dsmoe.sparsify.compare import Policies, with_policies
from dsmoe.sparsify.measure import ActiveExperts, count_experts
from dsmoe.sparsify.suffix import fast_masking, run_layers

Batches = Sequence[dict[str, Tensor]]


def token_losses(model: DSMoEForCausalLM, batches: Batches, policies: Policies) -> tuple[np.ndarray, float]:
    """The loss of each labelled token [T] in nats under some policies, and the mean share of active MLP experts."""
    found = []
    active = ActiveExperts()
    with torch.inference_mode(), with_policies(model, policies), fast_masking(model):
        for batch in batches:
            done = run_layers(model, batch)
            count_experts(active, model, batch, done.router_logits)
            labelled = (batch["shift_labels"] != -100).to(done.hidden.device)
            logits_TV = model.lm_head(done.hidden[labelled]).float()
            labels_T = batch["shift_labels"].to(done.hidden.device)[labelled]
            found.append(
                torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none").double().cpu()
            )
    routed = "mlp" in active.counts  # not in a dense model
    share = float(np.mean(active.mean("mlp"))) / model.config.num_experts if routed else 1.0
    return torch.cat(found).numpy(), share
