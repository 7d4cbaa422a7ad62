"""Loss against active experts: one densely trained model at many routing policies."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dsmoe.accounting import count_parameters
from dsmoe.config.routing import Policy
from dsmoe.model import DSMoEForCausalLM, use_routing
from dsmoe.sparsify.measure import measure


def frontier(
    model: DSMoEForCausalLM, batches: Sequence[dict[str, Tensor]], policies: Sequence[Policy]
) -> list[dict[str, Any]]:
    """Measure a model under each MLP policy.

    Args:
        model: densely trained.
        batches: held-out text, as of `evaluation_batches`.
        policies: one for all layers each.

    Returns:
        Per policy: "policy", "loss" (nats per token), "num_params_active", "mlp_active_fraction".
    """
    found = []
    for policy in tqdm(policies, desc="policies", unit="policy", leave=False):
        with use_routing(model, mlp=policy):
            active = measure(model, batches)
            counts = count_parameters(model.config, {part: active.mean(part) for part in active.counts})
        found.append(
            {
                "policy": policy,
                "loss": active.loss,
                "num_params_active": round(counts.active),
                "mlp_active_fraction": counts.mlp_active_fraction,
            }
        )
    return found
