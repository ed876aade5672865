"""One measurement: pods, servers, proxies, traffic, and what was counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.bench.load import Load, build
from pyambient.bench.processes import cpu_seconds
from pyambient.bench.rounds import Sample
from pyambient.errors import PyambientError
from pyambient.model.numbers import DNS_PORT, OUTBOUND_PORT

from .bed import Bed, Node, bed
from .serving import Null, Proxy, Real
from .work import APP_PORT, CLIENT, EXPLICIT, REAL, SERVER, Cell

_HERE = Path(__file__).parent
_LOOPBACK: Final = {"v4": "127.0.0.1", "v6": "::1"}


@dataclass(frozen=True, slots=True)
class Tools:
    """The compiled programs."""

    load: Path
    queries: Path
    null: Path

    @classmethod
    def built(cls, directory: Path) -> Tools:
        queries, null = (build(directory, _HERE / f"{name}.c") for name in ("queries", "null"))
        return cls(build(directory), queries, null)


class _Run:
    """A cell while it runs."""

    def __init__(self, cell: Cell, made: Bed, tools: Tools) -> None:
        self.cell = cell
        self.bed = made
        self.tools = tools

    @property
    def target(self) -> tuple[str, int]:
        """Whom the client connects to."""
        if self.cell.subject != EXPLICIT:
            return (self.bed.server_ip, self.cell.work.port)
        port = DNS_PORT if self.cell.work.is_dns else OUTBOUND_PORT
        return (_LOOPBACK[self.cell.family], port)

    def serve(self) -> Load:
        port = self.cell.work.port if self.cell.work.is_dns else APP_PORT
        return self._started(self._tool, SERVER, "serve", port)

    @property
    def _tool(self) -> Path:
        return self.tools.queries if self.cell.work.is_dns else self.tools.load

    def _started(self, program: Path, pod: str, *words: object) -> Load:
        load = Load(program, self.bed.app(pod), *words)
        load.wait_warm()
        return load

    def hold(self) -> Iterator[Load]:
        """The idle connections, if there are to be any."""
        if self.cell.work.held:
            yield self._started(self.tools.load, CLIENT, "idle", *self.target, self.cell.work.held)

    def send(self, seconds: float) -> Load:
        """The traffic, from the moment when it is warm."""
        at_once = () if self.cell.work.is_dns else (1,)
        return self._started(
            self._tool, CLIENT, self.cell.work.kind, *self.target, *at_once, seconds
        )

    def proxies(self) -> list[Proxy]:
        """Whoever serves the enrolled pods; in the client's, the one that is asked explicitly."""
        subject = self.cell.subject
        if subject == EXPLICIT:
            words = ("explicit", self.bed.server_ip, self.cell.work.port)
            return [Null(self.tools.null, self.bed, CLIENT, *words)]
        if subject.proxy == REAL:
            return [Real(self.bed)]
        how = self.bed.null_proxy
        return [Null(self.tools.null, self.bed, name, how) for name in self.bed.enrolled]


def measure(cell: Cell, node: Node, tools: Tools, seconds: float) -> Sample:
    """What the tool counted, CPU seconds of all that took part, and what the proxies saw.

    PyambientError if a proxy has not seen all that it had to, or something that it must not.
    """
    with bed(node, cell) as made, contextlib.ExitStack() as running:
        run = _Run(cell, made, tools)
        server = _until_end(running, run.serve())
        made.prepare()
        proxies = run.proxies()
        for proxy in proxies:
            running.callback(proxy.end)
        made.capture()
        for held in run.hold():
            _until_end(running, held)
        sample = _counted(run.send(seconds), server, proxies)
        least = _least(cell, sample)
        captured = min((proxy.seen(sample, least) for proxy in proxies), default=0)
    _check_capture(cell, captured, least)
    return {**sample, "captured": captured}


def _until_end(running: contextlib.ExitStack, load: Load) -> Load:
    running.callback(load.end)
    return load


def _counted(traffic: Load, server: Load, proxies: list[Proxy]) -> Sample:
    """With the CPU time of all, and of the proxies alone."""
    serving = [proxy.pid for proxy in proxies]
    pids = (traffic.pid, server.pid, *serving)
    before = {pid: cpu_seconds(pid) for pid in pids}
    spent: dict[int, float] = {}

    def take() -> None:
        spent.update({pid: cpu_seconds(pid) - before[pid] for pid in pids})

    counted = traffic.result(take)
    return {**counted, "cpu": sum(spent.values()), "cpu_proxy": sum(spent[p] for p in serving)}


def _least(cell: Cell, sample: Sample) -> float:
    """How many connections and queries a proxy has to have seen."""
    if not cell.subject.captured and cell.subject != EXPLICIT:
        return 0
    return sample["operations"] if cell.work.connects_each_time else 1 + cell.work.held


def _check_capture(cell: Cell, captured: float, least: float) -> None:
    """Nothing is worth less than the cost of a capture that did not happen."""
    if captured < least or (captured and not least):
        raise PyambientError(
            f"{cell.subject.name}, {cell.row}: a proxy saw {captured:.0f} of {least:.0f}",
            "run 'pyambient check'",
        )
