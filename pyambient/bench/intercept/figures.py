"""What is told of the samples: figures with their spread and their ratios. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from pyambient.bench.rounds import Results, Sample

from .work import BULK, CONNECTIONS, DIRECT, DNS, EXPLICIT, FAMILIES, HELD, PING_PONG, Work


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of one kind of work."""

    name: str
    work: Work
    unit: str
    value: Callable[[Sample], float]
    more_is_better: bool = False


def rate(sample: Sample) -> float:
    """Operations per second."""
    return sample["operations"] / sample["seconds"]


def cpu_per_operation(sample: Sample) -> float:
    """Microseconds of client, proxies and server."""
    return sample["cpu"] / sample["operations"] * 1e6


def gigabits_per_second(sample: Sample) -> float:
    return sample["bytes"] * 8e-9 / sample["seconds"]


def median_latency(sample: Sample) -> float:
    """Microseconds."""
    return sample["p50"]


SET_UP: Final = Figure("connection set-up", CONNECTIONS, "/s", rate, more_is_better=True)
CPU: Final = Figure("CPU per connection", CONNECTIONS, "µs", cpu_per_operation)
ROUND_TRIP: Final = Figure("ping-pong, p50", PING_PONG, "µs", median_latency)
STREAM: Final = Figure("bulk", BULK, "Gbit/s", gigabits_per_second, more_is_better=True)
QUERY: Final = Figure("DNS over UDP, p50", DNS, "µs", median_latency)
BESIDE: Final = Figure(f"ping-pong beside {HELD.held} held, p50", HELD, "µs", median_latency)
FIGURES: Final = (SET_UP, CPU, ROUND_TRIP, STREAM, QUERY, BESIDE)


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one subject in one family; ratios are None where there is nothing to compare.

    `low` and `high` are the least and the most of the rounds.
    """

    figure: Figure
    family: str
    subject: str
    median: float
    low: float
    high: float
    to_direct: float | None
    to_explicit: float | None


def lines(results: Results) -> Iterator[Line]:
    """All that was measured, figure by figure."""
    for figure in FIGURES:
        for family in FAMILIES:
            row = f"{figure.work.name}/{family}"
            for subject in results.samples.get(row, {}):
                yield _line(results, figure, family, row, subject)


def _line(results: Results, figure: Figure, family: str, row: str, subject: str) -> Line:
    samples = [figure.value(sample) for sample in results.of(row, subject)]
    return Line(
        figure,
        family,
        subject,
        results.median(row, subject, figure.value) or 0.0,
        min(samples),
        max(samples),
        results.ratio(row, subject, DIRECT.name, figure.value),
        results.ratio(row, subject, EXPLICIT.name, figure.value),
    )
