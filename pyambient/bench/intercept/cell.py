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
from .work import APP_PORT, CLIENT, EXPLICIT, SERVER, Cell

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

    def serve_by_null(self) -> dict[str, Load]:
        """A proxy in each enrolled pod; in the client's if it is asked explicitly."""
        if self.cell.subject == EXPLICIT:
            words = ("explicit", self.bed.server_ip, self.cell.work.port)
            return {CLIENT: self._null(CLIENT, *words)}
        how = "steered" if self.cell.subject.backend in _STEERING else "redirected"
        return {name: self._null(name, how) for name in self.bed.enrolled}

    def _null(self, pod: str, *words: object) -> Load:
        load = Load(self.tools.null, self.bed.proxy(pod), *words)
        load.wait_warm()
        return load


# Backends that leave a connection's addresses alone; the others translate them.
_STEERING: Final = frozenset({"bpf", "tc"})


def measure(cell: Cell, node: Node, tools: Tools, seconds: float) -> Sample:
    """What the tool counted, CPU seconds of all that took part, and what the proxies saw.

    PyambientError if a proxy has not seen all that it had to.
    """
    with bed(node, cell) as made, contextlib.ExitStack() as running:
        run = _Run(cell, made, tools)
        server = _until_end(running, run.serve())
        made.prepare()
        proxies = run.serve_by_null()
        for proxy in proxies.values():
            running.callback(proxy.end)
        made.capture()
        for held in run.hold():
            _until_end(running, held)
        pids = [server.pid, *(proxy.pid for proxy in proxies.values())]
        sample = _counted(run.send(seconds), pids)
        seen = {name: proxy.last_words() for name, proxy in proxies.items()}
    _check_capture(cell, sample, seen)
    return {**sample, "captured": min(map(_captured, seen.values()), default=0)}


def _until_end(running: contextlib.ExitStack, load: Load) -> Load:
    running.callback(load.end)
    return load


def _counted(traffic: Load, others: list[int]) -> Sample:
    pids = (traffic.pid, *others)
    before = sum(map(cpu_seconds, pids))
    after: list[float] = []
    counted = traffic.result(lambda: after.extend(map(cpu_seconds, pids)))
    return {**counted, "cpu": sum(after) - before}


def _captured(seen: Sample) -> float:
    return seen["accepted"] + seen["answered"]


def _check_capture(cell: Cell, sample: Sample, seen: dict[str, Sample]) -> None:
    """Nothing is worth less than the cost of a capture that did not happen."""
    least = sample["operations"] if cell.work.connects_each_time else 1 + cell.work.held
    for pod, words in seen.items():
        if _captured(words) < least:
            raise PyambientError(
                f"{cell.subject.name}, {cell.row}: the proxy of the {pod} saw"
                f" {_captured(words):.0f} of {least:.0f}",
                "run 'pyambient check'",
            )
