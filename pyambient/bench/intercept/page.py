"""The report: one page of HTML that needs nothing else, light or dark as its reader likes."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pyambient.bench.bars import Row
from pyambient.bench.markdown import number
from pyambient.bench.rounds import Results
from pyambient.errors import UsageError

from .bars import BARS
from .figures import FIGURES, by_exclusions, by_pods, lines
from .table import render, verdicts

_STYLE: Final = Path(__file__).with_name("page.css")
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What an interception costs</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>What an interception costs</h1>
<p>{subtitle}</p>
</header>
<main>
{sections}</main>
<footer>
<p>pyambient bench intercept, {time}. Ratios are taken within a round and their median is shown; a
thick line is the middle half of the rounds, a thin one all of them. Numbers of a busy machine are
good for ratios only.</p>
</footer>
</body>
</html>
"""
_LEGEND: Final = (
    '<p class="legend"><span class="dot"></span> IPv4 <span class="dot hollow"></span> IPv6</p>'
)


def page(content: Mapping[str, Any], results: Results) -> str:
    """The page of a run's results; UsageError without matplotlib."""
    sections = "".join(_sections(results))
    machine, settings = content["machine"], content["settings"]
    subtitle = (
        f"Linux {machine['kernel']}, {machine['cpus']} CPUs, {machine['processor']};"
        f" rounds: {settings['rounds']}, {settings['seconds']:g} s each"
    )
    return _PAGE.format(
        style=_STYLE.read_text("utf-8"),
        subtitle=html.escape(subtitle),
        sections=sections,
        time=html.escape(machine["time"][:10]),
    )


def _sections(results: Results) -> Iterator[str]:
    try:
        from . import drawings  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed", "run pip install 'pyambient[report]'"
        ) from None
    measured = list(lines(results))
    yield _section("Bars", "What backend bpf has to reach.", _scores(results), wide=True)
    for figure in FIGURES:
        if any(line.figure == figure and line.to_explicit for line in measured):
            text = f"{_LEGEND}{drawings.comparison(figure, measured)}"
            title = f"{figure.name[0].upper()}{figure.name[1:]}"
            yield _section(title, "", text)
    yield _section(
        "Pods that are not enrolled",
        "What it costs them that another pod of the node is.",
        drawings.bystanders(measured),
    )
    yield _section(
        "With pyambient's own proxy",
        "What is left of the difference between backends when the proxy does its work.",
        drawings.by_proxy(results),
    )
    yield _section(
        "More pods",
        "One pod of many that are enrolled.",
        drawings.growth(by_pods(results), "enrolled pods", 1.1),
    )
    yield _section(
        "More exclusions",
        "The destination is none of the excluded ones.",
        drawings.growth(by_exclusions(results), "excluded CIDRs"),
    )
    yield _section(
        "Enrolment",
        "A dot for each; the thick mark is the median, the thin one the 99th percentile.",
        drawings.enrolments(results),
    )
    text = html.escape(f"{render(results)}\n{verdicts(results)}")
    details = f"<details><summary>All numbers</summary><pre>{text}</pre></details>"
    yield f'<section class="wide">{details}</section>\n'


def _section(title: str, text: str, content: str, *, wide: bool = False) -> str:
    """Nothing where nothing was measured."""
    if not content:
        return ""
    words = f"<p>{html.escape(text)}</p>\n" if text else ""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}>\n<h2>{html.escape(title)}</h2>\n{words}{content}</section>\n"


def _scores(results: Results) -> str:
    scores = "".join(_score(row, value) for row in BARS if (value := row.figure(results)))
    return f'<ul class="scores">\n{scores}</ul>\n' if scores else ""


def _score(row: Row, value: float) -> str:
    """A bar with its value on a scale on which the bar to meet is at two thirds."""
    bound = row.at_least or row.at_most or 1
    short = value < bound if row.at_least else value > bound
    width = min(100.0, 100 * value / bound / 1.5)
    unit = " ms" if row.unit == "ms" else "&#8239;&times;"
    return (
        f'<li class="{"short" if short else "met"}"><span>{html.escape(row.name)}</span>'
        f'<b>{number(value)}{unit}</b><i style="--to: {width:.1f}%"></i>'
        f"<em>{html.escape(row.bar)}</em></li>\n"
    )
