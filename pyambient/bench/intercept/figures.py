"""What is told of the samples: figures with their spread and their ratios. Pure functions."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from pyambient.bench.rounds import Results, Sample
from pyambient.model.backends import BACKENDS

from .work import (
    BULK,
    CLIENT,
    CONNECTIONS,
    DIRECT,
    DNS,
    EXPLICIT,
    FAMILIES,
    HELD,
    OTHERS,
    PING_PONG,
    Subject,
    Work,
    beside,
    enrolling,
    excluding,
)


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


class Spread(NamedTuple):
    """What came of several rounds."""

    least: float
    lower: float
    median: float
    upper: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self | None:
        """None of no values; `lower` and `upper` are the quartiles."""
        if not values:
            return None
        if len(values) == 1:
            return cls(*(values[0],) * 5)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(min(values), lower, median, upper, max(values))


@dataclass(frozen=True, slots=True)
class Line:
    """One figure of one subject in one family; a ratio is None where there is none."""

    figure: Figure
    family: str
    subject: str
    values: Spread
    to_direct: Spread | None
    to_explicit: Spread | None


def lines(results: Results) -> Iterator[Line]:
    """All that was measured of traffic, figure by figure."""
    for figure in FIGURES:
        for family in FAMILIES:
            row = f"{figure.work.name}/{family}"
            for subject in sorted(results.samples.get(row, {}), key=_rank):
                values = Spread.of([figure.value(sample) for sample in results.of(row, subject)])
                if values is not None:
                    direct, explicit = (
                        Spread.of(results.ratios((row, subject), (row, other.name), figure.value))
                        for other in (DIRECT, EXPLICIT)
                    )
                    yield Line(figure, family, subject, values, direct, explicit)


def _rank(subject: str) -> tuple[bool, bool, str, str, int]:
    """Direct and explicit come first, then who captures, in the order of preference."""
    backend, enrolled, proxy = subject.split("/")
    known = BACKENDS.index(backend) if backend in BACKENDS else -1
    return (known >= 0, enrolled == OTHERS, proxy, enrolled, known)


@dataclass(frozen=True, slots=True)
class Growth:
    """What a connection costs by this backend when there is more of something: {how much: cost}.

    The cost is CPU time, and 1 is what it is with the least.
    """

    backend: str
    family: str
    costs: Mapping[int, Spread]


def by_exclusions(results: Results) -> list[Growth]:
    """Against the number of CIDRs that are excluded."""
    counts = _counts(results, " CIDRs")
    found = []
    for family, backend in itertools.product(FAMILIES, BACKENDS):
        subject, first = Subject(backend, CLIENT).name, excluding(min(counts, default=0), family)
        costs = {
            count: results.ratios(
                (excluding(count, family), subject), (first, subject), cpu_per_operation
            )
            for count in counts
        }
        found.append(_growth(backend, family, costs))
    return [growth for growth in found if growth is not None]


def by_pods(results: Results) -> list[Growth]:
    """Against the number of enrolled pods, each measured beside a client that asks explicitly."""
    found = []
    for backend in BACKENDS:
        subject = Subject(backend, CLIENT).name
        costs = {
            count: results.ratios(
                (beside(count, backend), subject),
                (beside(count, backend), EXPLICIT.name),
                cpu_per_operation,
            )
            for count in _counts(results, f" pods by {backend}")
        }
        unit = statistics.median(costs[min(costs)]) if costs else 1
        scaled = {count: [cost / unit for cost in made] for count, made in costs.items()}
        found.append(_growth(backend, "v4", scaled))
    return [growth for growth in found if growth is not None]


def _counts(results: Results, what: str) -> list[int]:
    """How much of it there was, in the order of growth."""
    rows = [row.rpartition("/")[2] for row in results.samples if row.endswith(what)]
    return sorted({int(row.removesuffix(what)) for row in rows})


def _growth(backend: str, family: str, costs: Mapping[int, Sequence[float]]) -> Growth | None:
    spreads = {count: Spread.of(values) for count, values in costs.items()}
    known = {count: spread for count, spread in spreads.items() if spread is not None}
    return Growth(backend, family, known) if known else None


def milliseconds(results: Results, place: int, backend: str, what: str = "enrol") -> list[float]:
    """How long each enrolment of the pod at this place took, shortest first."""
    return sorted(sample[what] * 1e3 for sample in results.of(enrolling(place), backend))


def places(results: Results) -> list[int]:
    """The pods whose enrolment was timed."""
    rows = (row.partition("/") for row in results.samples)
    return sorted(int(number) for kind, _, number in rows if kind == "enrolment")


def percentile(values: Sequence[float], part: float) -> float:
    """Of sorted values: the least one that this part of them does not exceed."""
    return values[max(0, math.ceil(part * len(values)) - 1)]
