"""Figures that have a bar to meet. Pure functions of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyambient.bench.rounds import Results

Figure = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Row:
    """`figure` has to be at least, or at most, its bar; without one the row only informs.

    `parts` are the medians that are shown beside it: ours, and what it is compared with.
    """

    name: str
    figure: Figure
    parts: tuple[Figure, ...]
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    def short(self, results: Results) -> bool:
        """Whether the row was measured and misses its bar."""
        figure = self.figure(results)
        if figure is None:
            return False
        low = self.at_least is not None and figure < self.at_least
        return low or (self.at_most is not None and figure > self.at_most)

    @property
    def bar(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}" if self.at_most is not None else ""
