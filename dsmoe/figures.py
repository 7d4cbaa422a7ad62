"""What all plots share. matplotlib is imported only when one is drawn."""

from pathlib import Path
from typing import Any

# of the three kinds of model, in every plot
KIND_COLOURS = {"dense": "#222222", "smoe": "#2f74b0", "dsmoe": "#d1495b"}


def pyplot() -> Any:
    """matplotlib.pyplot with a backend that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a PNG beside its place, rename it into it, and close the figure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.tmp.png")
    try:
        figure.savefig(beside, dpi=130, bbox_inches="tight")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
        pyplot().close(figure)
