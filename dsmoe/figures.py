"""What all plots share. matplotlib is imported only when one is drawn."""

from pathlib import Path
from typing import Any

from dsmoe.errors import UserError

# of the three kinds of model, in every plot
KIND_COLOURS = {"dense": "#222222", "smoe": "#2f74b0", "dsmoe": "#d1495b"}


def pyplot() -> Any:
    """matplotlib.pyplot with a backend that needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def check_figure(path: str | Path, option: str) -> None:
    """Refuse a place for a plot, before it is drawn.

    Raises:
        UserError: the name doesn't end in .png, which every plot is.
    """
    if Path(path).suffix.lower() != ".png":
        raise UserError(f"{option} {path}: plots are PNG files; give a name that ends in .png")


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
