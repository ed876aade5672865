"""The engine's table: figures, bars and what falls short."""

from __future__ import annotations

import pytest

from pyambient.bench.engine import work
from pyambient.bench.engine.rows import ROWS, compared
from pyambient.bench.engine.subjects import ENVOY, OURS
from pyambient.bench.engine.table import render
from pyambient.bench.rounds import Results


def sample(operations: int, cpu: float) -> dict[str, float]:
    return {
        "seconds": 2.0,
        "operations": operations,
        "bytes": 0,
        "p50": 100.0,
        "cpu_client": cpu / 2,
        "cpu_server": cpu / 2,
    }


def results(ours: int, theirs: int) -> Results:
    made = Results()
    made.add(work.TRIPS.name, OURS, sample(ours, 1.0))
    made.add(work.TRIPS.name, ENVOY, sample(theirs, 1.0))
    return made


@pytest.mark.parametrize(
    ("ours", "at_least", "at_most", "short"),
    [
        (1100, 1.2, None, True),
        (1300, 1.2, None, False),
        (1300, None, 1.2, True),
        (1100, None, 1.2, False),
        (1, None, None, False),
    ],
)
def test_a_bar_is_missed_from_its_own_side(ours, at_least, at_most, short):
    """Where more is better too little is short, where less is better too much is."""
    row = compared("rate", work.TRIPS, work.rate, "/s", at_least=at_least, at_most=at_most)
    assert row.short(results(ours, 1000)) is short


def test_the_table_shows_what_was_measured_and_nothing_else():
    """A row has both medians, the ratio, the bar and the verdict."""
    shown = render(ROWS, results(800, 1000)).splitlines()
    assert len(shown) == 3
    cells = [cell.strip() for cell in shown[2].strip("|").split("|")]
    assert cells == [
        "32 connections of round trips: CPU, µs",
        *["1,250", "1,000", "1.25"],
        "≤ 0.95",
        "SHORT",
    ]


def test_an_unmeasured_row_falls_short_of_nothing():
    """`--only` leaves rows out; they are not failures."""
    assert not [row for row in ROWS if row.short(Results())]
