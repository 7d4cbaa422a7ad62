"""Validation during training: all experts, and at the evaluation policy with the experts that it keeps."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from dsmoe.config.routing import Policy
from dsmoe.config.run import RunConfig
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.windows import evaluation_batches
from dsmoe.model import model_inputs, use_routing
from dsmoe.model.routing import keep_experts
from dsmoe.trainer.mask_phase import ThresholdController


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


class Validator:
    """Validation of one run, on the same batches each time.

    Args:
        config: of the run.
        corpus: its tokens.
        accelerator: of the run.
        model: unwrapped.
    """

    def __init__(self, config: RunConfig, corpus: TokenCorpus, accelerator: Accelerator, model: Any) -> None:
        self.accelerator, self.model, self.train = accelerator, model, config.train
        corpus.num_tokens(config.data.validation_split)  # complains about an unknown split
        self._make_batches = lambda: evaluation_batches(
            corpus,
            split=config.data.validation_split,
            sequence_length=config.data.sequence_length,
            batch_size=config.train.micro_batch_size,
            max_tokens=config.train.eval_tokens,
            isolate_documents=config.data.isolate_documents,
        )

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The batches, made at the first use."""
        return list(self._make_batches())

    def sparse_policy(self, controller: ThresholdController) -> Policy | None:
        """The MLP policy of sparse validation: the mask phase's, before it `train.eval_policy`; None without DS-MoE."""
        config = self.model.config
        if config.kind != "dsmoe" or config.num_experts == 1:
            return None
        return controller.policy(config.num_experts) if controller.steps else self.train.eval_policy

    def validate(self, controller: ThresholdController) -> dict[str, float]:
        """ "validation_loss" and, in a DS-MoE, "validation_loss_sparse"; nats per token."""
        found = {"validation_loss": mean_loss(self.accelerator, self.model, self.batches)}
        policy = self.sparse_policy(controller)
        if policy is not None:
            with use_routing(self.model, mlp=policy):
                found["validation_loss_sparse"] = mean_loss(self.accelerator, self.model, self.batches)
        return found

    @torch.no_grad()
    def active_experts(self, controller: ThresholdController) -> list[float] | None:
        """Mean MLP experts that the sparse policy keeps, per layer, on a few rows; None without DS-MoE."""
        policy = self.sparse_policy(controller)
        if policy is None:
            return None
        batch = {key: value[:4].to(self.accelerator.device) for key, value in self.batches[0].items()}
        with self.accelerator.autocast():
            logits = self.model.model(**model_inputs(batch), use_cache=False).router_logits
        mask = batch["attention_mask"].flatten().bool()
        kept = (keep_experts(layer.flatten(0, 1)[mask].softmax(-1), policy) for layer in logits)
        return [float(layer.sum(-1).double().mean()) for layer in kept]
