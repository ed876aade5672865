"""The results as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pyambient.bench.markdown import number, table
from pyambient.bench.rounds import Results
from pyambient.model.backends import BACKENDS

from .bars import BARS
from .figures import (
    Growth,
    Line,
    Spread,
    by_exclusions,
    by_pods,
    lines,
    milliseconds,
    percentile,
    places,
)
from .work import NOBODY, NULL, OTHERS

_TRAFFIC = ("figure", "path", "median", "least - most", "to direct", "to explicit")
_GROWTH = ("CPU per connection", "backend", "of", "cost", "least - most")
_ENROLMENT = ("enrolment, ms", "backend", "p50", "p99", "most", "un-enrolment, p50")
_BARS = ("bpf", "measured", "bar", "")


def render(results: Results) -> str:
    """All that was measured, as Markdown tables; what was not is left out."""
    parts = [
        (_TRAFFIC, [_traffic(line) for line in lines(results)]),
        (_GROWTH, list(_growths(results))),
        (_ENROLMENT, list(_enrolments(results))),
    ]
    return "\n".join(table(header, rows) for header, rows in parts if rows)


def verdicts(results: Results) -> str:
    """The bars, met or not."""
    rows: list[Sequence[str]] = []
    for bar in BARS:
        figure = bar.figure(results)
        if figure is not None:
            verdict = "SHORT" if bar.short(results) else "ok"
            rows.append((f"{bar.name}, {bar.unit}", number(figure), bar.bar, verdict))
    return table(_BARS, rows) if rows else ""


def label(subject: str) -> str:
    """A subject's name for people."""
    backend, enrolled, proxy = subject.split("/")
    if enrolled == NOBODY:
        return backend
    if enrolled == OTHERS:
        return f"not enrolled, beside {backend}"
    return f"{backend}, {enrolled}" + ("" if proxy == NULL else f", {proxy} proxy")


def _traffic(line: Line) -> tuple[str, ...]:
    return (
        f"{line.figure.name}, {line.family}, {line.figure.unit}",
        label(line.subject),
        number(line.values.median),
        _range(line.values),
        number(line.to_direct and line.to_direct.median),
        number(line.to_explicit and line.to_explicit.median),
    )


def _range(spread: Spread) -> str:
    return f"{number(spread.least)} - {number(spread.most)}"


def _growths(results: Results) -> Iterator[tuple[str, ...]]:
    yield from _growth("excluded CIDRs", by_exclusions(results))
    yield from _growth("enrolled pods", by_pods(results))


def _growth(what: str, growths: Iterable[Growth]) -> Iterator[tuple[str, ...]]:
    for growth in growths:
        for count, cost in growth.costs.items():
            name = f"{growth.backend}, {growth.family}"
            yield (what, name, f"{count:,}", number(cost.median), _range(cost))


def _enrolments(results: Results) -> Iterator[tuple[str, ...]]:
    for place in places(results):
        for backend in BACKENDS:
            took = milliseconds(results, place, backend)
            if took:
                freed = milliseconds(results, place, backend, "free")
                shown = (percentile(took, 0.5), percentile(took, 0.99), took[-1])
                cells = (*map(number, shown), number(percentile(freed, 0.5)))
                yield (f"pod {place}", backend, *cells)
