"""What is measured: a bed, the two proxies in it, and the load tool's servers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from pyambient.bench.load import Load
from pyambient.bench.processes import cpu_seconds
from pyambient.bench.rounds import Sample
from pyambient.hbone import LocalSettings

from . import envoy, ours
from .bed import APP_PORT, CLIENT, SERVER, SERVER_IP, Bed, Node

OURS, OURS_16K, ENVOY = "pyambient", "pyambient, 16 KiB frames", "envoy"
OURS_UNSHARED = "pyambient, 1 stream a tunnel"
OURS_NESTED = "pyambient, trio as the host"
_ENVOYS_FRAME = 16 << 10
ECHO, SINK, SOURCE = APP_PORT, APP_PORT + 1, APP_PORT + 2

Pair = tuple["subprocess.Popen[str]", "subprocess.Popen[str]"]
_STARTERS: dict[str, Callable[[Bed], Pair]] = {
    OURS: lambda bed: ours.start(bed, LocalSettings()),
    OURS_16K: lambda bed: ours.start(bed, LocalSettings(max_frame_sent=_ENVOYS_FRAME)),
    OURS_UNSHARED: lambda bed: ours.start(bed, LocalSettings(max_streams_opened=1)),
    OURS_NESTED: lambda bed: ours.start(bed, LocalSettings(), nested=True),
    ENVOY: envoy.start,
}


class Subject:
    """One pair of proxies under test."""

    def __init__(self, node: Node, name: str, program: Path) -> None:
        self.name = name
        self.bed = Bed(node, name.replace(",", "").replace(" ", "-"))
        self._program = program
        self._servers = Load(program, self.bed.app(SERVER), "serve", APP_PORT)
        self._servers.wait_warm()
        self.bed.prepare()
        self.proxies = _STARTERS[name](self.bed)
        self.bed.capture()

    def load(self, kind: str, port: int, *words: object) -> Load:
        """Start the load tool in the client pod, towards a port of the server."""
        return Load(self._program, self.bed.app(CLIENT), kind, SERVER_IP, port, *words)

    def hostile_load(self, pod: str, kind: str, ip: str, port: int, *words: object) -> Load:
        """Start it in another pod, where it gets what CPU time others leave.

        So what it takes from them is what the proxies do for it, and not what it does itself.
        """
        return Load(self._program, self.bed.app(pod, yields=True), kind, ip, port, *words)

    def measure(self, kind: str, port: int, *words: object) -> Sample:
        """Run the load tool; what it counted, and the CPU seconds of each proxy meanwhile."""
        load = self.load(kind, port, *words)
        load.wait_warm()
        before = self._clocks()
        after: list[float] = []
        sample = load.result(lambda: after.extend(self._clocks()))
        client, server = (b - a for a, b in zip(before, after, strict=True))
        return {**sample, "cpu_client": client, "cpu_server": server}

    def _clocks(self) -> list[float]:
        return [cpu_seconds(process.pid) for process in self.proxies]

    def end(self) -> None:
        self._servers.end()
        for process in self.proxies:
            process.kill()
            process.wait()

    def __repr__(self) -> str:
        return f"<Subject {self.name}>"
