"""The table, for people."""

from __future__ import annotations

from collections.abc import Iterable

from pyambient.bench.bars import Row
from pyambient.bench.markdown import number, table
from pyambient.bench.rounds import Results

_COLUMNS = ("work", "ours", "theirs", "ratio", "bar", "")


def render(rows: Iterable[Row], results: Results) -> str:
    """All rows that were measured, as a Markdown table."""
    measured = [row for row in rows if row.figure(results) is not None]
    return table(_COLUMNS, [_cells(row, results) for row in measured])


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    ours, theirs = (number(part(results)) for part in row.parts)
    verdict = "SHORT" if row.short(results) else "" if not row.bar else "ok"
    name = row.name.removesuffix(": ")
    return (f"{name}, {row.unit}", ours, theirs, number(row.figure(results)), row.bar, verdict)
