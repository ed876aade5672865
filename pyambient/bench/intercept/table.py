"""The results as text."""

from __future__ import annotations

from pyambient.bench.markdown import number, table
from pyambient.bench.rounds import Results

from .figures import Line, lines
from .work import NOBODY, NULL

_COLUMNS = ("figure", "path", "median", "least - most", "to direct", "to explicit")


def render(results: Results) -> str:
    """A line for each figure, family and subject, as a Markdown table."""
    return table(_COLUMNS, [_cells(line) for line in lines(results)])


def label(subject: str) -> str:
    """A subject's name for people."""
    backend, enrolled, proxy = subject.split("/")
    if enrolled == NOBODY:
        return backend
    return f"{backend}, {enrolled}" + ("" if proxy == NULL else f", {proxy} proxy")


def _cells(line: Line) -> tuple[str, ...]:
    return (
        f"{line.figure.name}, {line.family}, {line.figure.unit}",
        label(line.subject),
        number(line.median),
        f"{number(line.low)} - {number(line.high)}",
        number(line.to_direct),
        number(line.to_explicit),
    )
