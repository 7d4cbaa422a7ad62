"""What a finished run's summary says of its quality, and whether two runs' losses can be compared."""

from collections.abc import Mapping
from typing import Any

Summary = Mapping[str, Any]
# settings that choose the text on which a run is judged, by their section
MEASURED_BY = (("data", "sequence_length"), ("data", "validation_split"), ("train", "eval_tokens"))


def final_loss(summary: Summary, split: str = "validation") -> float:
    """The loss in the mode that a model is run in: sparse for a DS-MoE, its own for the others.

    Args:
        summary: a run's summary, or what a study keeps of it.
        split: "validation" or "test".

    Returns:
        Nats per token.
    """
    sparse = summary.get(f"{split}_loss_sparse")
    return summary[f"{split}_loss"] if sparse is None else sparse


def measured_by(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's configuration that choose the text on which it is judged, by their dotted names."""
    return {f"{section}.{name}": config[section][name] for section, name in MEASURED_BY}


def unlike(
    corpora: tuple[str | None, str | None],
    windows: tuple[str | None, str | None],
    measures: tuple[Mapping[str, Any] | None, Mapping[str, Any] | None],
) -> str | None:
    """Why the losses of two runs can't be compared; None where they can.

    Args:
        corpora: fingerprint of the text of each; None where it isn't known.
        windows: where each one's evaluation windows lie (`evaluation_windows` of a summary).
        measures: `measured_by` of each; None where it isn't known.
    """
    if None not in corpora and corpora[0] != corpora[1]:
        return "the two runs read different texts"
    if windows[0] != windows[1]:
        return "the two runs were measured on different parts of a split"
    first, second = measures
    if first is not None and second is not None:
        for name, value in first.items():
            if second[name] != value:
                return f"the two runs were measured with {name} {value} and {second[name]}"
    return None
