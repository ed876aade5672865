"""The table: each row's bar, and what of the samples it is judged by. Pure functions of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyambient.bench.rounds import Results, Sample

from . import work
from .subjects import ENVOY, OURS, OURS_16K

Figure = Callable[[Results], float | None]


@dataclass(frozen=True, slots=True)
class Row:
    """`figure` has to be at least, or at most, `bar`; without one the row only informs.

    `parts` are the medians that are shown beside it: ours, and what it is compared with.
    """

    name: str
    figure: Figure
    parts: tuple[Figure, Figure]
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


def compared(
    name: str,
    done: work.Work,
    value: Callable[[Sample], float],
    unit: str,
    *,
    ours: str = OURS,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Row:
    """A row that is a ratio of ours to Envoy's."""
    return Row(
        f"{done.name}: {name}",
        lambda results: results.ratio(done.name, ours, ENVOY, value),
        (
            lambda results: results.median(done.name, ours, value),
            lambda results: results.median(done.name, ENVOY, value),
        ),
        unit,
        at_least,
        at_most,
    )


def _connections(done: work.Work) -> tuple[Row, ...]:
    return (
        compared("rate", done, work.rate, "/s", at_least=1.2),
        compared("CPU", done, work.cpu_per_operation, "µs", at_most=0.85),
    )


def _bulk(done: work.Work) -> Row:
    return compared("", done, work.gigabits_per_cpu_second, "Gbit/CPU-s", at_least=1.1)


def _small_frames(done: work.Work) -> Row:
    name = "ours with 16 KiB frames"
    return compared(name, done, work.gigabits_per_cpu_second, "Gbit/CPU-s", ours=OURS_16K)


ROWS: tuple[Row, ...] = (
    *_connections(work.CONNECTIONS_16),
    *_connections(work.CONNECTIONS_64),
    compared("CPU", work.TRIPS, work.cpu_per_operation, "µs", at_most=0.95),
    compared("CPU", work.LONE, work.cpu_per_operation, "µs", at_most=1.2),
    compared("p50", work.LONE, work.median_latency, "µs", at_most=1.15),
    *map(_bulk, (work.UPLOAD, work.DOWNLOAD, work.UPLOADS, work.DOWNLOADS)),
    *map(_small_frames, (work.UPLOAD, work.DOWNLOAD)),
)
