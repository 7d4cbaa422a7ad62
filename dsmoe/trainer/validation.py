"""Validation during training: all experts, and at the evaluation policy with the experts that it keeps."""

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional

from dsmoe.accounting import stored_experts
from dsmoe.config import DSMoEConfig
from dsmoe.config.routing import Policy
from dsmoe.config.run import RunConfig
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.windows import evaluation_batches
from dsmoe.model import model_inputs, use_routing
from dsmoe.model.routing import keep_experts
from dsmoe.trainer.mask_phase import ThresholdController
from dsmoe.trainer.statistics import PARTS, part_logits


@torch.no_grad()
def mean_loss(
    accelerator: Accelerator, model: Any, batches: Sequence[dict[str, Tensor]]
) -> tuple[float, dict[str, list[float]]]:
    """Language-modelling loss in nats per token; the batches are split over processes.

    Returns:
        The loss, and the mean number of experts per layer that the config's policies keep, by part; parts that keep all
        are left out.
    """
    model.eval()
    config = model.config
    parts = [part for part in PARTS if not config.keeps_all(part)]
    shape = (len(parts), config.num_hidden_layers)
    sums = torch.zeros(3 + math.prod(shape), dtype=torch.float64, device=accelerator.device)
    # every process runs as many forwards as the others (shards are gathered in each); surplus ones don't count
    for first in range(0, len(batches), accelerator.num_processes):
        index = first + accelerator.process_index
        counts = float(index < len(batches))
        batch = {
            key: value.to(accelerator.device) for key, value in batches[min(index, len(batches) - 1)].items()
        }
        labels = batch["shift_labels"]
        with accelerator.autocast():
            output = model(**model_inputs(batch), use_cache=False)
        losses = functional.cross_entropy(
            output.logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
        )
        sums[:2] += counts * torch.stack([losses.double(), (labels != -100).sum().double()])
        if parts:
            mask, logits = batch["attention_mask"].flatten().bool(), part_logits(output)
            sums[2] += counts * mask.sum()
            kept = [kept_experts(logits[part], mask, config, part) for part in parts]
            sums[3:] += counts * torch.cat(kept)
    model.train()
    sums = accelerator.reduce(sums, reduction="sum")
    active = (sums[3:] / sums[2].clamp(min=1)).view(shape).tolist()
    return float(sums[0] / sums[1].clamp(min=1)), dict(zip(parts, active))


def kept_experts(
    router_logits: Iterable[Tensor], mask_T: Tensor, config: DSMoEConfig, part: str = "mlp"
) -> Tensor:
    """Experts kept in each layer by the config's policies, summed over the tokens of the mask; float64 [layers]."""
    kept = (
        keep_experts(
            logits.flatten(0, -2)[mask_T].softmax(-1),
            config.routing(part, layer),
            config.kept_experts(part, layer),
        )
        .sum()
        .double()
        for layer, logits in enumerate(router_logits)
    )
    return torch.stack(list(kept))


class Validator:
    """Validation of one run, on the same batches each time.

    Args:
        config: of the run.
        corpus: its tokens.
        accelerator: of the run.
        model: unwrapped.

    Attributes:
        measured: mean experts per layer of the last validation, in the mode that the model is run in; by part, without
            those that keep all.
    """

    def __init__(self, config: RunConfig, corpus: TokenCorpus, accelerator: Accelerator, model: Any) -> None:
        self.accelerator, self.model, self.train = accelerator, model, config.train
        self.split = config.data.validation_split
        corpus.num_tokens(self.split)  # complains about an unknown split
        self._make_batches = lambda split: evaluation_batches(
            corpus,
            split=split,
            sequence_length=config.data.sequence_length,
            batch_size=config.train.micro_batch_size,
            max_tokens=config.train.eval_tokens,
            isolate_documents=config.data.isolate_documents,
        )
        self.has_test = "test" in corpus.splits and self.split != "test"
        self.measured: dict[str, list[float]] = {}

    @cached_property
    def batches(self) -> list[dict[str, Tensor]]:
        """The batches, made at the first use."""
        return list(self._make_batches(self.split))

    def sparse_policy(self, controller: ThresholdController) -> Policy | Sequence[Policy] | None:
        """The MLP policy of sparse validation: the mask phase's, before it `train.eval_policy`; None without DS-MoE."""
        config = self.model.config
        if config.kind != "dsmoe" or config.num_experts == 1:
            return None
        return controller.policy(config.num_experts) if controller.steps else self.train.eval_policy

    def validate(self, controller: ThresholdController) -> dict[str, Any]:
        """Losses in nats per token on the validation split.

        Returns:
            "validation_loss" with all experts (an SMoE: its own), and in a DS-MoE "validation_loss_sparse" with
            "active_experts_sparse", the mean MLP experts per layer that the sparse policy keeps.
        """
        return self._losses("validation", self.batches, controller)

    def test(self, controller: ThresholdController) -> dict[str, Any]:
        """The same on the test split ("test_loss", ...), for claims that no choice has touched; {} without the split."""
        if not self.has_test:
            return {}
        return self._losses("test", list(self._make_batches("test")), controller)

    def _losses(
        self, name: str, batches: list[dict[str, Tensor]], controller: ThresholdController
    ) -> dict[str, Any]:
        loss, active = mean_loss(self.accelerator, self.model, batches)
        found: dict[str, Any] = {f"{name}_loss": loss}
        policy = self.sparse_policy(controller)
        if policy is not None:
            with use_routing(self.model, mlp=policy):
                found[f"{name}_loss_sparse"], active = mean_loss(self.accelerator, self.model, batches)
        if name == "validation":
            self.measured = active
            if policy is not None:
                stored = [float(number) for number in stored_experts(self.model.config, "mlp")]
                found["active_experts_sparse"] = [round(value, 4) for value in active.get("mlp", stored)]
        return found

    @torch.no_grad()
    def active_experts(self, controller: ThresholdController) -> list[float] | None:
        """Mean MLP experts that the sparse policy keeps, per layer, on a few rows; None without DS-MoE."""
        policy = self.sparse_policy(controller)
        if policy is None:
            return None
        batch = {key: value[:4].to(self.accelerator.device) for key, value in self.batches[0].items()}
        with self.accelerator.autocast():
            logits = self.model(**model_inputs(batch), use_cache=False, logits_to_keep=1).router_logits
        mask = batch["attention_mask"].flatten().bool()
        with use_routing(self.model, mlp=policy):
            return (kept_experts(logits, mask, self.model.config) / mask.sum()).tolist()
