"""The table, for people."""

from __future__ import annotations

from collections.abc import Iterable

from pyambient.bench.rounds import Results

from .rows import Row

_COLUMNS = ("work", "ours", "theirs", "ratio", "bar", "")


def render(rows: Iterable[Row], results: Results) -> str:
    """All rows that were measured, as a Markdown table."""
    lines = [_COLUMNS, *(_cells(row, results) for row in rows if row.figure(results) is not None)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = ["| " + " | ".join(_padded(line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts) + "\n"


def _padded(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    return [f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)]


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    ours, theirs = (_number(part(results)) for part in row.parts)
    verdict = "SHORT" if row.short(results) else "" if not row.bar else "ok"
    name = row.name.removesuffix(": ")
    return (f"{name}, {row.unit}", ours, theirs, _number(row.figure(results)), row.bar, verdict)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
