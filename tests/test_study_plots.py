"""What the plot of paired differences shows."""

import matplotlib
import pytest

from dsmoe.spread import spread
from dsmoe.study import plot


def pair(name, split, differences):
    return {
        "first": name,
        "second": "dense",
        "seeds": list(range(len(differences))),
        split: {**spread(differences), "differences": differences},
    }


def drawn(monkeypatch, pairs):
    figures = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: figures.append(figure))
    plot.pairs_plot({"pairs": pairs}, "pairs.png")
    (axes,) = figures[0].axes
    plot.pyplot().close(figures[0])
    return axes


def rows(axes):
    """Of each row the seeds, the mean and the interval that are drawn, and whether in black."""
    found = {}
    for line in axes.lines[1:]:  # the first marks zero
        (place,) = set(line.get_ydata())
        row = found.setdefault(axes.get_yticklabels()[place].get_text(), {})
        part = {"o": "seeds", "D": "mean", "None": "interval"}[line.get_marker()]
        row[part] = list(line.get_xdata())
        row.setdefault("black", []).append(matplotlib.colors.to_rgb(line.get_color()) == (0, 0, 0))
    return found


def test_a_row_shows_seeds_mean_and_interval_and_black_tells_a_difference(monkeypatch):
    pairs = [
        pair("told", "test", [0.10, 0.11, 0.12]),
        pair("tie", "test", [-0.1, 0.0, 0.2]),
        pair("single", "test", [0.3]),
        pair("unmeasured", "validation", [0.5, 0.6]),
    ]
    axes = drawn(monkeypatch, pairs)
    found = rows(axes)
    assert list(found) == ["told - dense", "tie - dense", "single - dense"]
    told, tie, single = found.values()
    assert told["seeds"] == [0.10, 0.11, 0.12] and told["mean"] == pytest.approx([0.11])
    assert told["interval"] == pairs[0]["test"]["interval"]
    assert all(told["black"]) and not any(tie["black"]) and not any(single["black"])
    assert single.keys() == {"seeds", "black"}
    # the interval of the tie is wide, and cut off
    low, high = axes.get_xlim()
    assert pairs[1]["test"]["interval"][0] < low < -0.1 and high > 0.3
    assert "on test" in axes.get_xlabel()


def test_validation_is_shown_where_nothing_was_tested(monkeypatch):
    axes = drawn(monkeypatch, [pair("one", "validation", [0.0, 0.0])])
    assert list(rows(axes)) == ["one - dense"] and "on validation" in axes.get_xlabel()
