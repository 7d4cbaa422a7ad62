"""Removing the experts that calibration text hardly uses: stored bytes fall, and the config says which were kept."""

from typing import Any

from dsmoe.model import DSMoEForCausalLM, remove_experts
from dsmoe.sparsify.measure import ActiveExperts


def experts_in_use(
    model: DSMoEForCausalLM, part: str, active: ActiveExperts, share: float
) -> list[list[int]]:
    """The experts of each layer that more than a share of the tokens keep.

    At least as many stay as the layer's policy needs (its k, or one): then those that are used most.

    Args:
        model: its config holds the policies and the stored experts.
        part: "mlp" or "attention".
        active: measured with these policies.
        share: of the tokens, from 0 to 1.
    """
    found = []
    for layer, uses in enumerate(active.uses[part]):
        counts = uses.tolist()
        present = model.config.kept_experts(part, layer) or list(range(len(counts)))
        policy = model.config.routing(part, layer)
        if policy["policy"] == "dense":
            found.append(list(present))
            continue
        needed = policy.get("k") or 1
        by_use = sorted(present, key=lambda expert: -counts[expert])
        used = sum(counts[expert] > share * active.num_tokens for expert in present)
        found.append(sorted(by_use[: max(needed, used)]))
    return found


def remove_unused(model: DSMoEForCausalLM, active: ActiveExperts, share: float) -> dict[str, Any]:
    """Remove, in place, the experts that at most a share of the tokens keep.

    Args:
        model: with its policies set.
        active: measured with these policies.
        share: of the tokens; 0: experts that no token keeps.

    Returns:
        JSON-able: {"share", "mlp": [removed experts per layer], "attention": [...], "num_removed"}.
    """
    report: dict[str, Any] = {"share": share, "num_removed": 0}
    for part in active.uses:
        kept = experts_in_use(model, part, active, share)
        removed = []
        for layer, entry in enumerate(kept):
            present = model.config.kept_experts(part, layer) or range(len(active.uses[part][layer]))
            removed.append([expert for expert in present if expert not in entry])
        report[part] = removed
        report["num_removed"] += sum(map(len, removed))
        if any(removed):
            remove_experts(model, part, kept)
    return report
