"""What a run's mask phase trained its model for: active shares, and the policy of each."""

from collections.abc import Mapping
from typing import Any

from dsmoe.config.routing import Policy
from dsmoe.trainer.mask_phase import threshold_policy


def trained_policies(summary: Mapping[str, Any]) -> dict[float, Policy]:
    """The policy of the MLP experts that the mask phase ended with, by the active share it was steered to.

    Args:
        summary: of a finished run.

    Returns:
        Ascending by share; empty without a mask phase, or where it trained with given policies.
    """
    thresholds = summary.get("mask_phase_thresholds")
    if thresholds is None:
        threshold = summary.get("mask_phase_threshold")
        if threshold is None:
            return {}
        settings = summary["config"]["mask_phase"]
        # earlier versions named one of given policies too, which nothing used
        thresholds = {} if settings.get("policies") else {settings["target_active"]: threshold}
    num_experts = summary["config"]["model"]["num_experts"]
    found = {
        float(share): threshold_policy(threshold, num_experts) for share, threshold in thresholds.items()
    }
    return {share: found[share] for share in sorted(found) if share < 1}
