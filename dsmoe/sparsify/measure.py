"""Measuring on text: how many experts each layer keeps, and the loss."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from dsmoe.model import DSMoEForCausalLM, model_inputs
from dsmoe.model.routing import keep_experts

# histogram of log2(N * p): N * p from 2^-100 to 2^10 in steps of 0.23%; a decided router's smallest are that small
LOWEST, HIGHEST, BINS = -100.0, 10.0, 32768


@dataclass
class ActiveExperts:
    """Kept experts per layer and token.

    Attributes:
        counts: {"mlp" | "attention": L histograms [N + 1] int64: tokens that keep 0, 1, ..., N experts}.
        uses: {part: L vectors [N] int64: tokens that keep each expert}.
        scores: {part: [BINS] histogram over all layers of log2(N * p), of which a threshold is a quantile}.
        num_tokens: tokens measured.
        loss: language-modelling loss in nats per token, with the model's policies.
    """

    counts: dict[str, list[Tensor]] = field(default_factory=dict)
    uses: dict[str, list[Tensor]] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    num_tokens: int = 0
    loss: float = float("nan")

    def mean(self, part: str) -> list[float]:
        """Mean kept experts of a token, per layer."""
        return [self._mean(histogram) for histogram in self.counts[part]]

    def share(self, part: str) -> float:
        """Mean share of the experts that a token keeps, over tokens and layers."""
        means = self.mean(part)
        return sum(means) / len(means) / (len(self.counts[part][0]) - 1)

    def percentile(self, part: str, share: float) -> list[int]:
        """The smallest count that at least `share` of the tokens don't exceed, per layer."""
        found = []
        for histogram in self.counts[part]:
            cumulative = histogram.cumsum(0).double() / histogram.sum().clamp(min=1)
            found.append(int((cumulative < share - 1e-12).sum()))
        return found

    def threshold_for(self, part: str, share: float) -> float:
        """The threshold on N * p above which this share of all (token, expert) pairs lies, over all layers."""
        above = self.scores[part].flip(0).cumsum(0).double() / self.scores[part].sum()
        bins_kept = int((above <= share).sum())
        return float(2.0 ** (HIGHEST - bins_kept * (HIGHEST - LOWEST) / BINS))

    @staticmethod
    def _mean(histogram: Tensor) -> float:
        counts = torch.arange(len(histogram), dtype=torch.float64)
        return float((histogram * counts).sum() / histogram.sum().clamp(min=1))


@torch.no_grad()
def measure(
    model: DSMoEForCausalLM, batches: Iterable[dict[str, Tensor]], progress: str | None = None
) -> ActiveExperts:
    """Run the model with its routing policies over text.

    Args:
        model: its config says which experts are kept.
        batches: of `evaluation_batches` or `text_batches`.
        progress: title of a progress bar; None: none.

    Returns:
        ActiveExperts over the tokens that are not padding.
    """
    found = ActiveExperts()
    total, num_labels = 0.0, 0
    training = model.training
    model.eval()
    for batch in tqdm(batches, desc=progress, disable=progress is None, unit="batch", leave=False):
        batch = {key: value.to(model.device) for key, value in batch.items()}
        outputs = model(**model_inputs(batch), use_cache=False)
        labels = batch["shift_labels"]
        losses = functional.cross_entropy(
            outputs.logits.float().flatten(0, 1), labels.flatten(), reduction="sum"
        )
        total += float(losses.double())
        num_labels += int((labels != -100).sum())
        logits = {"mlp": outputs.router_logits, "attention": outputs.attention_router_logits}
        count_experts(
            found, model, batch, {part: value for part, value in logits.items() if value is not None}
        )
    model.train(training)
    found.loss = total / max(1, num_labels)
    return found


def count_experts(
    found: ActiveExperts,
    model: DSMoEForCausalLM,
    batch: dict[str, Tensor],
    router_logits: Mapping[str, Sequence[Tensor]],
) -> None:
    """Add a batch's tokens that are not padding to the counts.

    Args:
        found: added to.
        model: its config holds the policies.
        batch: of `evaluation_batches`.
        router_logits: {part: one [B, S, N] per layer}.
    """
    mask = batch["attention_mask"].flatten().bool()
    found.num_tokens += int(mask.sum())
    for part, per_layer in router_logits.items():
        for layer, logits in enumerate(per_layer):
            probs_TN = logits.flatten(0, 1)[mask.to(logits.device)].softmax(-1)
            kept_experts = model.config.kept_experts(part, layer)
            kept_TN = keep_experts(probs_TN, model.config.routing(part, layer), kept_experts)
            _count(found, part, layer, probs_TN, kept_TN)


def _count(found: ActiveExperts, part: str, layer: int, probs_TN: Tensor, kept: Tensor) -> None:
    num_experts = kept.shape[-1]
    scores = (probs_TN * num_experts).log2().clamp(LOWEST, HIGHEST).float()
    histogram = torch.histc(scores, bins=BINS, min=LOWEST, max=HIGHEST).long().cpu()
    found.scores[part] = found.scores.get(part, torch.zeros(BINS, dtype=torch.int64)) + histogram
    histograms = found.counts.setdefault(part, [])
    uses = found.uses.setdefault(part, [])
    if len(histograms) == layer:
        histograms.append(torch.zeros(num_experts + 1, dtype=torch.int64))
        uses.append(torch.zeros(num_experts, dtype=torch.int64))
    histograms[layer] += kept.sum(-1).bincount(minlength=num_experts + 1).cpu()
    uses[layer] += kept.sum(0).cpu()
