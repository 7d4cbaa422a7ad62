"""How far a sparse model is from its reference on text: KL divergence, paired loss increase, active experts.

Shapes: T tokens that have a label, D hidden size, V vocabulary, C clusters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dsmoe.config.routing import Policy
from dsmoe.model import DSMoEForCausalLM, use_routing
from dsmoe.sparsify.measure import ActiveExperts, count_experts
from dsmoe.sparsify.suffix import fast_masking, run_layers

Policies = dict[str, list[Policy]]

_CHUNK_ENTRIES = 1 << 23  # float32 copies of log-probabilities stay below 32 MiB
_LONG_DOCUMENT = 4  # windows
_FEWEST_DOCUMENTS = 10


def reference_policies(model: DSMoEForCausalLM) -> Policies:
    """The policies that the config holds now, per part."""
    layers = range(model.config.num_hidden_layers)
    return {part: [model.config.routing(part, layer) for layer in layers] for part in ("mlp", "attention")}


def with_policies(model: DSMoEForCausalLM, policies: Policies) -> Any:
    """`use_routing` of a dict of policies per part."""
    return use_routing(model, mlp=policies.get("mlp"), attention=policies.get("attention"))


@dataclass
class Comparison:
    """A sparse model beside its reference, on the same tokens.

    Attributes:
        loss_increase: nats per token, sparse minus reference.
        standard_error: of the increase, clustered by document or window.
        kl: mean KL(reference || sparse) of the next-token distributions, nats per token.
        reference_loss: nats per token.
        num_tokens: labels compared.
        active: kept experts, of the sparse model.
        policies: of the sparse model.
    """

    loss_increase: float
    standard_error: float
    kl: float
    reference_loss: float
    num_tokens: int
    active: ActiveExperts = field(repr=False, default_factory=ActiveExperts)
    policies: Policies = field(repr=False, default_factory=dict)

    @property
    def upper(self) -> float:
        """The increase plus one standard error."""
        return self.loss_increase + self.standard_error

    @property
    def damage(self) -> float:
        """`expected_increase` of this comparison."""
        return expected_increase(self.kl, self.loss_increase, self.standard_error)

    def as_dict(self) -> dict[str, float]:
        """The numbers, JSON-able."""
        return {
            "loss_increase": self.loss_increase,
            "standard_error": self.standard_error,
            "kl": self.kl,
            "reference_loss": self.reference_loss,
            "num_tokens": self.num_tokens,
        }


def expected_increase(kl: float, increase: float, standard_error: float) -> float:
    """The KL divergence, moved towards the measured increase as far as that contradicts it beyond its noise.

    For a calibrated model the expected increase is the KL divergence, which is known far more precisely than the
    increase itself; a model whose reference is not its best (trained with masks, for example) contradicts that.
    Source: positive-part James-Stein shrinkage of one number.
    """
    excess = increase - kl
    if excess == 0 or not math.isfinite(standard_error):
        return kl
    return kl + excess * max(0.0, 1 - 2 * (standard_error / excess) ** 2)


def clusters(batches: Sequence[dict[str, Tensor]], eos_token_id: int | None) -> list[Tensor]:
    """Cluster of each token, [B, S] int64 per batch: its document.

    Batches that say which (`documents`) are taken at their word, if they have ten documents at least. In others a
    document begins where eos is an input, and may go on in the next window of the stream; one that fills more than four
    windows (a book) counts window by window, since few huge clusters say nothing about their spread.
    """
    known = [batch["documents"] for batch in batches if "documents" in batch]
    if (
        len(known) == len(batches)
        and len(torch.cat([ids.flatten() for ids in known]).unique()) >= _FEWEST_DOCUMENTS
    ):
        return known
    documents, count, longest = [], 0, 0
    last: int | None = None
    for batch in batches:
        found = torch.empty_like(batch["input_ids"])
        for row, (inputs, labels) in enumerate(zip(batch["input_ids"], batch["shift_labels"])):
            starts = ((inputs == (-1 if eos_token_id is None else eos_token_id)) & (labels != -100)).long()
            if not starts[0] and int(inputs[0]) != last:
                starts[0] = 1  # a window that doesn't continue the one before
            found[row] = count + starts.cumsum(0)
            count, last, longest = int(found[row, -1]), int(labels[-1]), max(longest, len(inputs))
        documents.append(found)
    sizes = torch.cat([found.flatten() for found in documents]).bincount()
    at = count + 1
    for found in documents:
        windows = torch.arange(at, at + len(found))[:, None].expand(found.shape)
        at += len(found)
        found[:] = torch.where(sizes[found] > _LONG_DOCUMENT * longest, windows, found)
    return documents


def clustered_error(values_T: np.ndarray, clusters_T: np.ndarray) -> float:
    """Standard error of the mean of values that are dependent within a cluster; infinite for a single cluster.

    Ratio estimator with the usual C / (C - 1): sqrt(C / (C - 1) * sum over clusters of (sum of (value - mean))^2) / T.
    """
    _, index = np.unique(clusters_T, return_inverse=True)
    sums = np.bincount(index, weights=values_T - values_T.mean())
    count = len(sums)
    if count < 2:
        return math.inf
    return float(math.sqrt(count / (count - 1) * float((sums**2).sum())) / len(values_T))


class Comparer:
    """Compares policies with a reference that runs once: its final hidden states are kept.

    Args:
        model: in evaluation mode; its weights stay as they are while this lives.
        batches: of `evaluation_batches`.
        reference: the policies to compare with; None: those of the config.
        progress: title of a bar over the reference's pass; None: no bar.
    """

    def __init__(
        self,
        model: DSMoEForCausalLM,
        batches: Sequence[dict[str, Tensor]],
        reference: Policies | None = None,
        progress: str | None = None,
    ) -> None:
        self.model, self.batches = model, list(batches)
        self.reference = reference or reference_policies(model)
        self.clusters = clusters(self.batches, model.config.eos_token_id)
        self.hidden: list[Tensor] = []
        with torch.inference_mode(), with_policies(model, self.reference), fast_masking(model):
            for batch in tqdm(
                self.batches, desc=progress, disable=progress is None, unit="batch", leave=False
            ):
                self.hidden.append(self._labelled(batch, run_layers(model, batch).hidden))

    @staticmethod
    def _labelled(batch: dict[str, Tensor], values_BSX: Tensor) -> Tensor:
        return values_BSX[batch["shift_labels"].to(values_BSX.device) != -100]

    @property
    def num_tokens(self) -> int:
        """Labels."""
        return sum(len(hidden) for hidden in self.hidden)

    def cluster_ids(self) -> np.ndarray:
        """Cluster of each labelled token, [T]."""
        return torch.cat([self._labelled(b, c) for b, c in zip(self.batches, self.clusters)]).numpy()

    def distance(self, index: int, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KL, loss increase and reference loss of each labelled token, [T] float32, of a batch's hidden states."""
        batch = self.batches[index]
        labels = self._labelled(batch, batch["shift_labels"]).to(hidden_BSD.device)
        return token_distance(self.model, self.hidden[index], self._labelled(batch, hidden_BSD), labels)

    def __call__(self, policies: Policies, progress: str | None = None) -> Comparison:
        """Run the model under other policies; a part that is left out keeps the config's."""
        model = self.model
        columns: list[tuple[Tensor, ...]] = []
        active = ActiveExperts()
        with torch.inference_mode(), with_policies(model, policies), fast_masking(model):
            used = reference_policies(model)
            rows = tqdm(self.batches, desc=progress, disable=progress is None, unit="batch", leave=False)
            for index, batch in enumerate(rows):
                done = run_layers(model, batch)
                count_experts(active, model, batch, done.router_logits)
                columns.append(self.distance(index, done.hidden))
        kl, increase, reference = (torch.cat(column).double().cpu().numpy() for column in zip(*columns))
        active.loss = float((reference + increase).mean())
        return Comparison(
            float(increase.mean()), clustered_error(increase, self.cluster_ids()), float(kl.mean()),
            float(reference.mean()), len(kl), active, used,
        )  # fmt: skip


def token_distance(
    model: DSMoEForCausalLM, reference_TD: Tensor, hidden_TD: Tensor, labels_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(reference || sparse), sparse loss minus reference loss, and reference loss of each token, in nats.

    Args:
        model: its output projection is used.
        reference_TD: final hidden states of the reference.
        hidden_TD: those of the sparse model.
        labels_T: [T] int64.

    Returns:
        Three [T] tensors, at least float32.
    """
    chunk = max(1, _CHUNK_ENTRIES // model.config.vocab_size)
    found = []
    for at in range(0, len(labels_T), chunk):
        part = slice(at, at + chunk)
        reference_TV, sparse_TV = (
            _log_probs(model.lm_head(hidden[part])) for hidden in (reference_TD, hidden_TD)
        )
        kl = (reference_TV.exp() * (reference_TV - sparse_TV)).sum(-1)
        loss, sparse_loss = (
            -table.gather(-1, labels_T[part, None])[:, 0] for table in (reference_TV, sparse_TV)
        )
        found.append((kl, sparse_loss - loss, loss))
    kls, increases, losses = (torch.cat(column) for column in zip(*found))
    return kls, increases, losses


def _log_probs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def compare(
    model: DSMoEForCausalLM,
    batches: Sequence[dict[str, Tensor]],
    policies: Policies,
    reference: Policies | None = None,
) -> Comparison:
    """Compare a model under some policies with the same model under its reference policies.

    Args:
        model: a dsmoe model.
        batches: held-out text, as of `evaluation_batches`.
        policies: {"mlp": one policy per layer, "attention": ...}; a part that is left out keeps the config's.
        reference: the same for the reference; None: the config's.

    Returns:
        The paired increase of the loss, its clustered standard error, the KL divergence, and the active experts.
    """
    training = model.training
    model.eval()
    try:
        return Comparer(model, batches, reference)(policies)
    finally:
        model.train(training)
