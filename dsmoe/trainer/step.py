"""One optimiser step: language-modelling loss plus router losses, exact over processes and micro-batches."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dsmoe.config.run import GuardSettings, RouterLossSettings
from dsmoe.losses import RouterStatistics, router_losses
from dsmoe.model import model_inputs
from dsmoe.trainer.distillation import Distiller
from dsmoe.trainer.guard import Guard
from dsmoe.trainer.mi_control import MIController
from dsmoe.trainer.parallel import Replicated
from dsmoe.trainer.statistics import RunningMean, Statistics, add, batch_statistics, part_logits, reduce

Batch = dict[str, Tensor]


@dataclass
class StepResult:
    """What a step leaves behind.

    Attributes:
        lm_loss: mean language-modelling loss over the global batch, nats per token.
        grad_norm: norm of the gradient before clipping.
        statistics: router statistics of the global batch.
        skipped: why no weight moved; None: the step was taken.
    """

    lm_loss: float
    grad_norm: float
    statistics: Statistics
    skipped: str | None


@dataclass
class Stepper:
    """Computes gradients and applies them.

    Attributes:
        accelerator: of the run.
        model: as prepared by the accelerator.
        optimizer: as prepared by the accelerator.
        settings: coefficients of the router losses.
        grad_clip: largest norm of the gradient; 0: none.
        running: the running p(e), where that is asked for.
        parallel: how the processes share the model.
        guard: decides whether a gradient is applied.
        distiller: what sparse steps learn from the all-experts mode; None: nothing.
        mi_control: steers the coefficient of the MLP routers' mutual information; None: it is fixed.
    """

    accelerator: Accelerator
    model: Any
    optimizer: Any
    settings: RouterLossSettings
    grad_clip: float
    running: RunningMean | None
    parallel: Replicated
    guard: Guard = field(default_factory=lambda: Guard(GuardSettings()))
    distiller: Distiller | None = None
    mi_control: MIController | None = None

    def step(self, micro_batches: list[Batch], mi_factor: float, masked: bool = False) -> StepResult:
        """Run one step.

        Args:
            micro_batches: this process's part of the global batch.
            mi_factor: share of the mutual-information coefficients at this step.
            masked: whether it is a step of the mask phase.

        Returns:
            StepResult; its numbers are the same in every process.
        """
        accelerator = self.accelerator
        num_labels = sum((batch["shift_labels"] != -100).sum() for batch in micro_batches)
        num_labels = accelerator.reduce(torch.as_tensor(num_labels), reduction="sum").clamp(min=1)
        num_tokens = sum(_count_tokens(batch) for batch in micro_batches)
        num_tokens = accelerator.reduce(num_tokens, reduction="sum")
        known = self._gather(micro_batches) if self.needs_gathering(len(micro_batches)) else None
        seen: Statistics | None = None
        running = self.running and dataclasses.replace(self.running, means=dict(self.running.means))
        lm_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self.parallel.synchronised(self.model, last):
                lm_loss, statistics = self._micro_step(batch, num_labels, num_tokens, mi_factor, known)
            lm_sum += lm_loss
            seen = add(seen, statistics)
        norm = self.parallel.clip(self.model, self.grad_clip or math.inf)
        # every process judges the same two numbers: the loss is a sum over processes, the norm the same in all
        judged = torch.stack([lm_sum, norm.to(lm_sum) / accelerator.num_processes])
        lm_loss, grad_norm = accelerator.reduce(judged, reduction="sum").tolist()
        skipped = self.guard.judge(lm_loss, grad_norm, masked)
        if skipped is None:
            self.optimizer.step()
        elif self.running is not None and running is not None:
            self.running.means, self.running.weight = running.means, running.weight
        self.optimizer.zero_grad()
        return StepResult(lm_loss, grad_norm, reduce(accelerator, seen or {}), skipped)

    def needs_gathering(self, num_micro_batches: int) -> bool:
        """Whether a step of so many micro-batches begins with a forward pass for their common statistics."""
        settings = self.settings
        wanted = (
            settings.router_mi_loss_coef_mlp
            or settings.router_mi_loss_coef_attention
            or settings.load_balancing_coef
        )
        return bool(wanted) and num_micro_batches > 1 and settings.mi_statistics == "exact"

    @torch.no_grad()
    def _gather(self, micro_batches: list[Batch]) -> Statistics:
        """The statistics of all micro-batches and processes, by a forward without gradients and with few logits."""
        model = self.parallel.bare(self.model)
        total: Statistics | None = None
        for batch in micro_batches:
            with self.accelerator.autocast():
                outputs = model(**model_inputs(batch), use_cache=False, logits_to_keep=1)
            total = add(total, batch_statistics(model.config, outputs, batch.get("attention_mask")))
        return reduce(self.accelerator, total or {})

    def _micro_step(
        self,
        batch: Batch,
        num_labels: Tensor,
        num_tokens: Tensor,
        mi_factor: float,
        known: Statistics | None,
    ) -> tuple[Tensor, Statistics]:
        config = self.parallel.bare(self.model).config
        outputs = self.model(
            **model_inputs(batch),
            shift_labels=batch["shift_labels"],
            num_items_in_batch=num_labels,
            use_cache=False,
        )
        token_mask = batch.get("attention_mask")
        control = self.mi_control
        threshold = None if control is None else control.settings.mi_control_threshold
        local = batch_statistics(config, outputs, token_mask, threshold)
        loss = outputs.loss
        bare = self.parallel.bare(self.model)
        if self.distiller is not None and self.distiller.wanted(bare):
            loss = self.distiller.add(loss, outputs, bare, batch, num_labels)
        statistics = known
        means: dict[str, Tensor] = {}
        if statistics is None:
            statistics = reduce(self.accelerator, local)
            if self.running is not None:
                means = self.running.update(statistics)
            # a micro-batch stands for its share of the step's tokens
            statistics = {part: _with_tokens(value, num_tokens) for part, value in statistics.items()}
        for part, logits in part_logits(outputs).items():
            weights = control.layer_factors() if control is not None and part == "mlp" else None
            losses = router_losses(logits, statistics[part], token_mask, means.get(part), weights)
            mi_coef = getattr(self.settings, f"router_mi_loss_coef_{part}") * mi_factor
            if mi_coef:
                loss = loss + mi_coef * losses.mutual_information
            if self.settings.load_balancing_coef and part == "mlp":
                loss = loss + self.settings.load_balancing_coef * losses.load_balancing
            if self.settings.router_z_loss_coef:
                loss = loss + self.settings.router_z_loss_coef * losses.z_loss
        # gradients are averaged over processes, and every term above is already divided by the global count
        self.parallel.backward(self.model, loss * self.accelerator.num_processes)
        return outputs.loss.detach().double(), local


def _count_tokens(batch: Batch) -> Tensor:
    tokens = batch["input_ids"]
    # made on the device: a copy from the host would have it wait
    return batch["attention_mask"].sum() if "attention_mask" in batch else tokens.new_full((), tokens.numel())


def _with_tokens(statistics: RouterStatistics, num_tokens: Tensor) -> RouterStatistics:
    """The same means and shares, for a batch of `num_tokens`."""
    scale = num_tokens.double() / statistics.num_tokens.clamp(min=1)
    return RouterStatistics(*(tensor * scale for tensor in statistics.tensors()))
