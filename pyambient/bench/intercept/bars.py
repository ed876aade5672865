"""What the backend `bpf` has to reach, as ratios within one run and as times of an enrolment."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Final

from pyambient.bench.bars import Figure, Row
from pyambient.bench.rounds import Results, Sample

from .figures import (
    Growth,
    by_pods,
    median_latency,
    milliseconds,
    percentile,
    rate,
)
from .work import (
    CLIENT,
    CONNECTIONS,
    DIRECT,
    EXPLICIT,
    FAMILIES,
    OTHERS,
    PING_PONG,
    Subject,
    Work,
)

_BPF, _IPTABLES = Subject("bpf", CLIENT), Subject("iptables", CLIENT)
_UNENROLLED = Subject("bpf", OTHERS)
_FIRST, _LATER = 1, 200
_TIMES: Final = "times"


def _compared(
    name: str,
    pair: tuple[Subject, Subject],
    work: Work,
    value: Callable[[Sample], float],
    *,
    at_least: float | None = None,
    at_most: float | None = None,
) -> Iterator[Row]:
    """A ratio of two subjects for each family."""
    one, other = pair
    for family in FAMILIES:
        figure = functools.partial(
            Results.ratio,
            work=f"{work.name}/{family}",
            subject=one.name,
            other=other.name,
            value=value,
        )
        yield Row(f"{name}, IP{family}", figure, (), _TIMES, at_least, at_most)


def _most_pods(results: Results) -> float | None:
    """The cost of a connection with the most pods enrolled, by that with one."""
    growth = next((g for g in by_pods(results) if g.backend == "bpf"), None)
    return None if growth is None else _at_the_end(growth)


def _at_the_end(growth: Growth) -> float | None:
    return growth.costs[max(growth.costs)].median if len(growth.costs) > 1 else None


def _enrolment(place: int, part: float) -> Figure:
    def figure(results: Results) -> float | None:
        values = milliseconds(results, place, "bpf")
        return percentile(values, part) if values else None

    return figure


def _enrolments() -> Iterator[Row]:
    for place in (_FIRST, _LATER):
        name = "1st" if place == _FIRST else f"{place}th"
        yield Row(f"enrolling the {name} pod, p50", _enrolment(place, 0.5), (), "ms", at_most=10)
        yield Row(f"enrolling the {name} pod, p99", _enrolment(place, 0.99), (), "ms", at_most=25)


BARS: Final[tuple[Row, ...]] = (
    *_compared("connections, to explicit", (_BPF, EXPLICIT), CONNECTIONS, rate, at_least=0.95),
    *_compared("connections, to iptables", (_BPF, _IPTABLES), CONNECTIONS, rate, at_least=1.2),
    *_compared("ping-pong, to explicit", (_BPF, EXPLICIT), PING_PONG, median_latency, at_most=1.05),
    *_compared("unenrolled, to direct", (_UNENROLLED, DIRECT), CONNECTIONS, rate, at_least=0.98),
    Row("CPU of most pods, to one", _most_pods, (), _TIMES, at_most=1.1),
    *_enrolments(),
)
