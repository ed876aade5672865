"""The drawings of the report: ratios with their spread, growth, and times of enrolments."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from pyambient.bench.rounds import Results
from pyambient.model.backends import BACKENDS

from .figures import (
    QUERY,
    ROUND_TRIP,
    SET_UP,
    Figure,
    Growth,
    Line,
    Spread,
    milliseconds,
    percentile,
    places,
)
from .ink import INK, drawn
from .work import (
    BOTH,
    CLIENT,
    CONNECTIONS,
    DIRECT,
    FAMILIES,
    NULL,
    OTHERS,
    PROXIES,
    SERVER,
    Subject,
)

_GROUPS: Final = {
    CLIENT: "client enrolled",
    SERVER: "server enrolled",
    BOTH: "both enrolled",
}
_OFFSETS: Final = {"v4": -0.16, "v6": 0.16}
_ROW, _MARGIN = 0.27, 1.0  # inches
_DOT: Final = 6.5
_NAME_GAP: Final = 0.065
_NEAR: Final = 0.2  # parts of an axis


class _Rows:
    """Named rows from the top down, in groups with a heading each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._headings: list[tuple[float, str]] = []
        self._places: list[float] = []
        self._next = 0.0

    def heading(self, text: str) -> None:
        self._next += 0.35 if self.names else 0
        self._headings.append((self._next, text))
        self._next += 0.9

    def row(self, name: str) -> float:
        """Its place."""
        self.names.append(name)
        self._places.append(self._next)
        self._next += 1
        return self._places[-1]

    @property
    def height(self) -> float:
        """In inches, with the axis."""
        return self._next * _ROW + _MARGIN

    def finish(self, axes: Any) -> None:
        axes.set_yticks(self._places, self.names)
        axes.set_ylim(self._next - 0.4, -0.7)
        for place, text in self._headings:
            style = {"fontsize": 9, "color": INK["muted"], "va": "center", "ha": "right"}
            axes.annotate(
                text,
                (0, place),
                xytext=(-6, 0),
                textcoords="offset points",
                xycoords=("axes fraction", "data"),
                **style,
            )


def comparison(figure: Figure, lines: Iterable[Line]) -> str:
    """One figure of all backends as a ratio to the explicit proxy, both families side by side."""
    chosen = {(n.subject, n.family): n.to_explicit for n in lines if n.figure == figure}
    chart = _Chart()
    for enrolled, heading in _GROUPS.items():
        subjects = {backend: Subject(backend, enrolled).name for backend in BACKENDS}
        chart.group(heading, subjects, chosen)
    direct = [found.median for f in FAMILIES if (found := chosen.get((DIRECT.name, f)))]

    def finish(axes: Any) -> None:
        axes.set_xlabel(f"times that of the explicit proxy  ·  {_better(figure)}")
        if direct:
            _two_references(axes, sum(direct) / len(direct), "no proxy", 1, "explicit proxy")
        else:
            _reference(axes, 1, "explicit proxy")
        _shade(axes, more=figure.more_is_better)

    return chart.drawn(finish, figure.name)


def bystanders(lines: Iterable[Line]) -> str:
    """Pods that are not enrolled beside one that is, as a ratio to a node without any."""
    chart = _Chart()
    known = list(lines)
    for figure in (SET_UP, ROUND_TRIP, QUERY):
        chosen = {(n.subject, n.family): n.to_direct for n in known if n.figure == figure}
        subjects = {backend: Subject(backend, OTHERS).name for backend in BACKENDS}
        chart.group(f"{figure.name}  {_better(figure)}", subjects, chosen)

    def finish(axes: Any) -> None:
        _reference(axes, 1, "no pod enrolled")
        axes.set_xlabel("times that without an enrolled pod")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.9), max(high, 1.1))

    return chart.drawn(finish, "pods that are not enrolled")


def by_proxy(results: Results) -> str:
    """Connections per second by `iptables`' of the same proxy: how much is left of a difference."""
    chart = _Chart()
    for proxy in PROXIES:
        ratios = {}
        for backend, family in itertools.product(BACKENDS, FAMILIES):
            row = f"{CONNECTIONS.name}/{family}"
            one, other = (Subject(name, CLIENT, proxy).name for name in (backend, "iptables"))
            spread = Spread.of(results.ratios((row, one), (row, other), SET_UP.value))
            ratios[one, family] = spread
        subjects = {backend: Subject(backend, CLIENT, proxy).name for backend in BACKENDS}
        chart.group("proxy in C" if proxy == NULL else "pyambient's proxy", subjects, ratios)

    def finish(axes: Any) -> None:
        _reference(axes, 1, "iptables")
        axes.set_xlabel(f"connections per second, times those by iptables  ·  {_better(SET_UP)}")
        _shade(axes, more=True)

    return chart.drawn(finish, "connections per second by proxy")


def _better(figure: Figure) -> str:
    return "more is better →" if figure.more_is_better else "← less is better"


class _Chart:
    """Ratios, a row for each backend, in groups."""

    def __init__(self) -> None:
        self._rows = _Rows()
        self._marks: list[tuple[float, str, str, Spread]] = []

    def group(
        self,
        heading: str,
        subjects: Mapping[str, str],
        ratios: Mapping[tuple[str, str], Spread | None],
    ) -> None:
        """`subjects` are by backend, `ratios` by subject and family; what has none is left out."""
        found = {
            backend: {f: spread for f in FAMILIES if (spread := ratios.get((subject, f)))}
            for backend, subject in subjects.items()
        }
        if any(found.values()):
            self._rows.heading(heading)
        for backend, spreads in found.items():
            if spreads:
                place = self._rows.row(backend)
                self._marks += [(place, f, backend, spread) for f, spread in spreads.items()]

    def drawn(self, finish: Callable[[Any], None], title: str) -> str:
        """The drawing; "" of nothing."""

        def draw(axes: Any) -> None:
            for place, family, backend, spread in self._marks:
                _mark(axes, place + _OFFSETS[family], spread, INK[backend], hollow=family == "v6")
            self._rows.finish(axes)
            finish(axes)

        return drawn(draw, self._rows.height, title) if self._marks else ""


def _mark(axes: Any, place: float, spread: Spread, colour: str, *, hollow: bool) -> None:
    """The median as a dot, the middle half of the rounds as a bar, all of them as a line."""
    axes.plot((spread.least, spread.most), (place, place), color=colour, lw=1.2, alpha=0.55)
    axes.plot(
        (spread.lower, spread.upper),
        (place, place),
        color=colour,
        lw=4,
        alpha=0.35,
        solid_capstyle="round",
    )
    inside = INK["paper"] if hollow else colour
    axes.plot(
        spread.median, place, "o", ms=_DOT, mec=colour, mfc=inside, mew=1.6, zorder=3, clip_on=False
    )


def _reference(
    axes: Any, value: float, text: str, *, dashed: bool = False, align: str = "center"
) -> None:
    axes.axvline(value, color=INK["muted"], lw=1.1, ls=(0, (3, 3)) if dashed else "-", zorder=1)
    axes.annotate(
        text,
        (value, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha=align,
        va="bottom",
        fontsize=9,
        color=INK["muted"],
    )


def _two_references(axes: Any, dashed: float, its_name: str, solid: float, the_others: str) -> None:
    """Two of them; where they are close their names stand on either side."""
    axes.plot((dashed, solid), (0, 0), alpha=0)  # so that both are on the axis
    low, high = axes.get_xlim()
    aligns = ("center", "center")
    if abs(dashed - solid) < _NEAR * (high - low):
        aligns = ("right", "left") if dashed < solid else ("left", "right")
    _reference(axes, dashed, its_name, dashed=True, align=aligns[0])
    _reference(axes, solid, the_others, align=aligns[1])


def _shade(axes: Any, *, more: bool) -> None:
    """The side of the explicit proxy on which a capture is better than it."""
    low, high = axes.get_xlim()
    low, high = min(low, 0.95), max(high, 1.05)
    axes.set_xlim(low, high)
    span = (1, high) if more else (low, 1)
    axes.axvspan(*span, color=INK["good"], alpha=0.08, lw=0, zorder=0)


def growth(growths: Sequence[Growth], what: str, bar: float | None = None) -> str:
    """The cost of a connection against how much there is of something, IPv4, a line a backend."""
    chosen = [growth for growth in growths if growth.family == "v4" and len(growth.costs) > 1]

    def draw(axes: Any) -> None:
        counts = sorted({count for growth in chosen for count in growth.costs})
        for growth in chosen:
            _line(axes, growth, counts)
        _name_ends(axes, {g.backend: g.costs[max(g.costs)].median for g in chosen}, len(counts))
        axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
        axes.set_xlim(-0.25, len(counts) - 0.4)
        axes.set_xlabel(what)
        axes.set_ylabel("CPU per connection, times the first")
        axes.grid(visible=True, axis="y")
        axes.grid(visible=False, axis="x")
        if bar is not None:
            axes.axhline(bar, color=INK["muted"], lw=1, ls=(0, (3, 3)))
            axes.annotate(
                f"bar of bpf: {bar:g}",
                (0, bar),
                xycoords=("axes fraction", "data"),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=9,
                color=INK["muted"],
            )

    return drawn(draw, 3.4, f"cost against {what}") if chosen else ""


def _line(axes: Any, growth: Growth, counts: Sequence[int]) -> None:
    colour = INK[growth.backend]
    places = [counts.index(count) for count in growth.costs]
    spreads = list(growth.costs.values())
    lower, upper = [s.lower for s in spreads], [s.upper for s in spreads]
    axes.fill_between(places, lower, upper, color=colour, alpha=0.15, lw=0)
    axes.plot(places, [s.median for s in spreads], "o-", color=colour, ms=5, lw=2)


def _name_ends(axes: Any, ends: Mapping[str, float], count: int) -> None:
    """A name behind each line's end, none over another."""
    low, high = _limits(axes)
    gap = (high - low) * _NAME_GAP
    place = low
    for backend, end in sorted(ends.items(), key=lambda item: item[1]):
        place = max(end, place + gap)
        axes.text(count - 0.9, place, backend, va="center", color=INK[backend], fontsize=10)


def _limits(axes: Any) -> tuple[float, float]:
    """What the lines need, and not less than what makes noise look like noise."""
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.8), max(high, 1.4))
    low, high = axes.get_ylim()
    return low, high


def enrolments(results: Results) -> str:
    """Each enrolment as a dot, with the median; a row for each backend and place."""
    rows = _Rows()
    made: list[tuple[float, str, list[float]]] = []
    for number in places(results):
        rows.heading("1st pod" if number == 1 else f"{number}th pod")
        for backend in BACKENDS:
            took = milliseconds(results, number, backend)
            if took:
                made.append((rows.row(backend), backend, took))

    def draw(axes: Any) -> None:
        for place, backend, took in made:
            _cloud(axes, place, took, INK[backend])
        rows.finish(axes)
        for value, text in ((10, "p50: 10 ms"), (25, "p99: 25 ms")):
            _reference(axes, value, text, dashed=True)
        axes.set_xscale("log")
        ticks = [t for t in _TICKS if t <= 2 * max(took[-1] for _, _, took in made)]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("milliseconds from the request to the answer  ·  ← less is better")

    return drawn(draw, rows.height, "time of an enrolment") if made else ""


_TICKS: Final = (2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000)


def _cloud(axes: Any, place: float, took: Sequence[float], colour: str) -> None:
    heights = [place + 0.22 * ((7 * n) % 11 - 5) / 5 for n in range(len(took))]
    axes.plot(took, heights, "o", ms=3.2, color=colour, alpha=0.4, mew=0)
    for part, width in ((0.5, 3), (0.99, 1.4)):
        value = percentile(took, part)
        axes.plot((value, value), (place - 0.36, place + 0.36), color=colour, lw=width)
