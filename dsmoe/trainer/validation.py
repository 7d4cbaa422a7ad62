"""Validation during training: all experts, and at the evaluation policy with the experts that it keeps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Measured:
    """What a model does on held-out text.

    Attributes:
        loss: nats per token.
        by_source: the same of each source alone.
        active: mean number of experts per layer that the config's policies keep, by part; parts that keep all are left
            out.
    """

    loss: float
    by_source: dict[str, float]
    active: dict[str, list[float]]


def measure(
    accelerator: Accelerator, model: Any, batches: Mapping[str, Sequence[dict[str, Tensor]]]
) -> Measured:
    """The language-modelling loss over all sources and over each; the batches of a source are split over processes."""
    sums = {name: _sums(accelerator, model, some) for name, some in batches.items()}
    loss, num_labels, num_tokens, *kept = torch.stack(list(sums.values())).sum(0).tolist()
    layers, active = model.config.num_hidden_layers, [number / max(num_tokens, 1) for number in kept]
    parts = _sparse_parts(model.config)
    return Measured(
        loss / max(num_labels, 1),
        {name: float(part[0] / part[1].clamp(min=1)) for name, part in sums.items()},
        {part: active[i * layers : (i + 1) * layers] for i, part in enumerate(parts)},
    )


def _sparse_parts(config: DSMoEConfig) -> list[str]:
    return [part for part in PARTS if not config.keeps_all(part)]


@torch.no_grad()
def _sums(accelerator: Accelerator, model: Any, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Over all processes: losses in nats, labels, tokens, and experts kept by part and layer; float64, on CPU."""
    model.eval()
    config = model.config
    parts = _sparse_parts(config)
    sums = torch.zeros(
        3 + len(parts) * config.num_hidden_layers, dtype=torch.float64, device=accelerator.device
    )
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
    return accelerator.reduce(sums, reduction="sum").cpu()


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


def _batches(config: RunConfig, corpus: TokenCorpus, split: str) -> dict[str, list[dict[str, Tensor]]]:
    """The evaluation batches of a split, by source; sources without text in it are left out."""
    found = {
        source: list(
            evaluation_batches(
                corpus,
                split=split,
                sequence_length=config.data.sequence_length,
                batch_size=config.train.micro_batch_size,
                max_tokens=config.train.eval_tokens,
                isolate_documents=config.data.isolate_documents,
                source=source,
            )
        )
        for source in corpus.source_names
    }
    return {source: batches for source, batches in found.items() if batches}


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
        self._make_batches = lambda split: _batches(config, corpus, split)
        self.has_test = "test" in corpus.splits and self.split != "test"
        self.measured: dict[str, list[float]] = {}

    @cached_property
    def batches(self) -> dict[str, list[dict[str, Tensor]]]:
        """The batches by source, made at the first use."""
        return self._make_batches(self.split)

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
            "active_experts_sparse", the mean MLP experts per layer that the sparse policy keeps. Where the text has
            several sources, "validation_loss_by_source" and "validation_loss_sparse_by_source": of each alone.
        """
        return self._losses("validation", self.batches, controller)

    def test(self, controller: ThresholdController) -> dict[str, Any]:
        """The same on the test split ("test_loss", ...), for claims that no choice has touched; {} without the split."""
        if not self.has_test:
            return {}
        return self._losses("test", self._make_batches("test"), controller)

    def _losses(
        self, name: str, batches: dict[str, list[dict[str, Tensor]]], controller: ThresholdController
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def note(key: str) -> dict[str, list[float]]:
            measured = measure(self.accelerator, self.model, batches)
            found[key] = measured.loss
            if len(batches) > 1:
                found[f"{key}_by_source"] = measured.by_source
            return measured.active

        active = note(f"{name}_loss")
        policy = self.sparse_policy(controller)
        if policy is not None:
            with use_routing(self.model, mlp=policy):
                active = note(f"{name}_loss_sparse")
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
        first = next(iter(self.batches.values()))[0]
        batch = {key: value[:4].to(self.accelerator.device) for key, value in first.items()}
        with self.accelerator.autocast():
            logits = self.model(**model_inputs(batch), use_cache=False, logits_to_keep=1).router_logits
        mask = batch["attention_mask"].flatten().bool()
        with use_routing(self.model, mlp=policy):
            return (kept_experts(logits, mask, self.model.config) / mask.sum()).tolist()
