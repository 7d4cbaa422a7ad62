"""Router statistics of the two parts of the model ("mlp", "attention") over the global batch."""

from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from dsmoe.config import DSMoEConfig
from dsmoe.losses import RouterStatistics, router_statistics, statistics_values
from dsmoe.model.routing import keep_experts

PARTS = ("mlp", "attention")
Statistics = dict[str, RouterStatistics]


def part_logits(outputs) -> dict[str, tuple[Tensor, ...]]:
    """The router logits that a model returned, by part; parts without routers are left out."""
    found = {"mlp": outputs.router_logits, "attention": outputs.attention_router_logits}
    return {part: logits for part, logits in found.items() if logits is not None}


def batch_statistics(
    config: DSMoEConfig, outputs, token_mask: Tensor | None, mlp_threshold: float | None = None
) -> Statistics:
    """Statistics of one micro-batch; loads count the experts that the routing policy keeps.

    Args:
        config: of the model, with the routing policies of the forward.
        outputs: of the model.
        token_mask: [B, S], nonzero where a token counts; None: all do.
        mlp_threshold: MLP experts with N * p above it are counted too; None: they aren't.
    """
    found = {}
    for part, logits in part_logits(outputs).items():
        kept = None
        if not config.keeps_all(part):
            kept = [
                keep_experts(
                    layer_logits.detach().flatten(0, -2).softmax(-1),
                    config.routing(part, layer),
                    config.kept_experts(part, layer),
                )
                for layer, layer_logits in enumerate(logits)
            ]
        threshold = mlp_threshold if part == "mlp" else None
        found[part] = router_statistics(logits, token_mask, kept, threshold)
    return found


def add(first: Statistics | None, second: Statistics) -> Statistics:
    """Sum of two (the first may be None)."""
    return second if first is None else {part: first[part] + second[part] for part in second}


def reduce(accelerator: Accelerator, statistics: Statistics) -> Statistics:
    """Sum over data-parallel processes, in one collective."""
    if accelerator.num_processes == 1 or not statistics:
        return statistics
    flat = {part: value.flatten() for part, value in statistics.items()}
    total = accelerator.reduce(torch.cat(list(flat.values())), reduction="sum")
    pieces = total.split([vector.numel() for vector in flat.values()])
    return {part: statistics[part].unflatten(piece) for part, piece in zip(flat, pieces)}


def report(statistics: Statistics) -> dict[str, dict[str, list]]:
    """Per-layer values for the log, by part: losses, entropies, loads and mean kept experts."""
    found = {}
    for part, value in statistics.items():
        values = statistics_values(value)
        found[part] = {name: [_rounded(row) for row in tensor.tolist()] for name, tensor in values.items()}
    return found


def _rounded(value):
    return [_rounded(item) for item in value] if isinstance(value, list) else round(value, 6)


@dataclass
class RunningMean:
    """Running average of p(e) per layer and part, for `mi_statistics: running`.

    Attributes:
        decay: per micro-batch.
        means: {part: [L, N]}, biased towards 0 at the start.
        weight: the total weight, which corrects that bias.
    """

    decay: float
    means: dict[str, Tensor] = field(default_factory=dict)
    weight: float = 0.0

    def update(self, statistics: Statistics) -> dict[str, Tensor]:
        """Add one micro-batch (of all processes) and return the corrected p(e) per part."""
        self.weight = self.decay * self.weight + (1 - self.decay)
        for part, value in statistics.items():
            mean = value.probs_LN / value.num_tokens.clamp(min=1)
            # a checkpoint gives it back on the CPU
            old = self.means[part].to(mean.device) if part in self.means else torch.zeros_like(mean)
            self.means[part] = self.decay * old + (1 - self.decay) * mean
        return {part: mean / self.weight for part, mean in self.means.items()}

    def tensors(self) -> dict[str, Tensor]:
        """State for a checkpoint."""
        state = {f"running.{part}": mean for part, mean in self.means.items()}
        return {**state, "running.weight": torch.tensor(self.weight, dtype=torch.float64)}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state of `tensors`."""
        self.weight = float(tensors["running.weight"])
        self.means = {part: tensors[f"running.{part}"] for part in PARTS if f"running.{part}" in tensors}
