"""The frontier of a checkpoint: every family of policies at many budgets, chosen on one text and judged on another."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dsmoe.accounting import count_parameters, inference_flops_per_token
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM
from dsmoe.sparsify.calibrate import calibrate
from dsmoe.sparsify.calibration import CalibrationText
from dsmoe.sparsify.compare import Comparer, Comparison
from dsmoe.sparsify.families import DEFAULT, GLOBAL
from dsmoe.sparsify.points import Points
from dsmoe.sparsify.search import Candidate, Frontier
from dsmoe.sparsify.union import unions

Batches = Sequence[dict[str, Tensor]]
# what is drawn and compared; the calibrated ones are searched layer by layer
CONTESTANTS = (
    ("uniform_k", "gate"),
    ("global_threshold", "gate"),
    ("global_top_p", "gate"),
    ("per_layer_k", "gate"),
    ("per_layer_threshold", "gate"),
    ("per_layer_threshold", "gate_norm"),
    ("per_expert_threshold", "gate"),
    ("top_p", "gate"),
)
UNION_BATCHES = 2


class Judge:
    """Measures chosen policies on text that calibration never saw.

    Args:
        model: in evaluation mode.
        held_out: that text.
        context_length: tokens of context, for the attention's FLOPs.
    """

    def __init__(self, model: DSMoEForCausalLM, held_out: Batches, context_length: int) -> None:
        self.model, self.held_out, self.context_length = model, held_out, context_length
        self.comparer = Comparer(model, held_out)

    def row(self, chosen: Candidate, frontier: Frontier) -> dict[str, Any]:
        """One measured point, JSON-able; "share" is that of active experts on the held-out text."""
        comparison = self.comparer(chosen.policies)
        active = comparison.active
        means = {part: active.mean(part) for part in active.counts}
        counts = count_parameters(self.model.config, means)
        loss = comparison.reference_loss + comparison.loss_increase
        return {
            "family": chosen.family,
            "share": frontier.allocation.share(active),
            "share_on_calibration": chosen.share,
            "increase_on_calibration": chosen.comparison.loss_increase,
            "mlp_active_fraction": counts.mlp_active_fraction,
            "attention_active_fraction": counts.attention_active_fraction,
            "num_params_active": counts.active,
            "num_params_total": counts.total,
            "flops_per_token": inference_flops_per_token(self.model.config, self.context_length, means),
            "active_bytes": counts.active * 2,
            "loss": loss,
            "perplexity": math.exp(loss),
            **comparison.as_dict(),
            "policies": chosen.policies,
        }

    def spread(self, comparison: Comparison, policies: Any) -> dict[str, Any]:
        """Active experts per layer: mean, median and 95th percentile over tokens, and unions over chunks of tokens."""
        active = comparison.active
        union = unions(self.model, self.held_out[:UNION_BATCHES], policies)
        return {
            part: {
                "mean": active.mean(part),
                "p50": active.percentile(part, 0.5),
                "p95": active.percentile(part, 0.95),
                "union": union[part],
            }
            for part in active.counts
        }


class Sample:
    """A calibration text, and the frontiers that are calibrated on it at the first need of a point that isn't known.

    Args:
        model: in evaluation mode.
        text: calibration text.
        judge: of the held-out text.
        points: where what is measured is kept.
    """

    def __init__(self, model: DSMoEForCausalLM, text: CalibrationText, judge: Judge, points: Points) -> None:
        self.model, self.text, self.judge, self.points = model, text, judge, points
        self._frontiers: dict[tuple[str, str], Frontier] = {}

    def frontier(self, family: str = "auto", score: str = "gate") -> Frontier:
        """The frontier that a family is taken from: those of one knob come from that of the default family."""
        key = ("auto", "gate") if family in (*GLOBAL, DEFAULT) and score == "gate" else (family, score)
        if key not in self._frontiers:
            # a frontier keeps hidden states of all its text: beside the default one, one at a time
            self._frontiers = {
                known: kept for known, kept in self._frontiers.items() if known == ("auto", "gate")
            }
            self._frontiers[key] = calibrate(
                self.model,
                self.text.batches,
                family=key[0],
                score=score,
                context_length=self.judge.context_length,
            )
        return self._frontiers[key]

    def at_share(self, share: float, family: str | None = None, score: str = "gate") -> dict[str, Any] | None:
        """The row of a family (None: what `dsmoe sparsify --target-active` gives); None: the share can't be met."""

        def measure() -> dict[str, Any] | None:
            frontier = self.frontier(family or "auto", score)
            try:
                chosen = frontier.at_share(share, family)
            except UserError:  # beyond what the reference or one expert a layer gives
                return None
            return {"asked": share, **self.judge.row(chosen, frontier)}

        return self._known(f"share {share!r} {family} {score}", measure)

    def within(self, bound: float, family: str | None = None) -> dict[str, Any]:
        """The row of the sparsest model within a bound of nats per token."""

        def measure() -> dict[str, Any]:
            frontier = self.frontier()
            return self.judge.row(frontier.within(bound, family), frontier)

        return self._known(f"bound {bound!r} {family}", measure)

    def _known(self, name: str, measure: Callable[[], Any]) -> Any:
        return self.points.get(f"{self.text.description['fingerprint']} {name}", measure)


def sweep_shares(
    sample: Sample, shares: Sequence[float], contestants: Sequence[tuple[str, str]] = CONTESTANTS
) -> list[dict[str, Any]]:
    """Every family at every share that it can meet.

    Args:
        sample: to calibrate on.
        shares: of active experts, weighted by their parameters (of an SMoE: up to its trained K).
        contestants: (family, score).

    Returns:
        One row per family and share; "asked" is the share asked for. `uniform_k` takes the largest K within it.
    """
    rows = []
    with tqdm(total=len(contestants) * len(shares), desc="frontier", unit="point") as bar:
        for family, score in contestants:
            for share in shares:
                bar.set_postfix_str(f"{family} {share:.0%}")
                row = sample.at_share(share, family, score)
                if row is not None:
                    rows.append({"score": score, **row})
                bar.update()
    return rows


def sweep_bounds(sample: Sample, bounds: Sequence[float]) -> list[dict[str, Any]]:
    """The sparsest model within each bound, by calibration and among uniform Ks, and what it costs on held-out text.

    Args:
        sample: to calibrate on.
        bounds: nats per token.

    Returns:
        Per bound {"bound", "calibrated": row, "uniform_k": row}. Of the held-out increase, "holds" says whether it is
        within the bound plus two standard errors, "below_bound" whether the measured number is within the bound itself.
    """
    found = []
    for bound in tqdm(bounds, desc="bounds", unit="bound"):
        entry: dict[str, Any] = {"bound": bound}
        for name, family in (("calibrated", None), ("uniform_k", "uniform_k")):
            row = sample.within(bound, family)
            increase = row["loss_increase"]
            entry[name] = {
                **row,
                "holds": increase <= bound + 2 * row["standard_error"],
                "below_bound": increase <= bound,
            }
        found.append(entry)
    return found
