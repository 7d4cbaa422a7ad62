"""Measured points that outlive an interruption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsmoe.files import read_json, write_json


class Points:
    """Results by name, written to a file as they come.

    Args:
        path: the file; what it holds is taken over if it is about the same.
        about: JSON-able; whatever the results depend on.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.known: dict[str, Any] = {}
        if path.exists():
            found = read_json(path)
            if found.get("about") == about:
                self.known = found["points"]

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """A point, measured unless it is known.

        Args:
            name: of the point.
            measure: gives something JSON-able.
        """
        if name not in self.known:
            self.known[name] = measure()
            write_json(self.path, {"about": self.about, "points": self.known})
        return self.known[name]
