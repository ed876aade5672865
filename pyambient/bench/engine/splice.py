"""Whether splice(2) pays where bytes are only passed on: `python -m pyambient.bench.engine.splice`.

The relay between plain sockets, three ways: with every block received and sent by a shared buffer,
with every block spliced through a pipe in the kernel, and as the product has it, which splices what
turns out to be bulk. Everything goes over lo; counted is the relay's own CPU time.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import trio

from pyambient.bench.load import Load, build
from pyambient.bench.markdown import number, table
from pyambient.bench.pods import Placement
from pyambient.bench.processes import cpu_seconds
from pyambient.bench.rounds import Results, Sample, turns
from pyambient.bench.walls import behind_walls, options_of
from pyambient.children import module
from pyambient.engine.accept import Listener, connect
from pyambient.engine.deadlines import Deadlines
from pyambient.engine.loop import Loop
from pyambient.engine.plain import PlainRelay
from pyambient.engine.relay import reset
from pyambient.engine.splicing import Bulk, PipePool, Splicer
from pyambient.engine.tls import SharedBuffers
from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress
from pyambient.netns import Netns

_MODULE = "pyambient.bench.engine.splice"
_RECEIVE, _SPLICE, _PRODUCT = _KINDS = "recv and send", "splice", "splice bulk"
_APP_PORT, _RELAY_PORT = 9000, 9100
_READY = "ready\n"


class _Work(NamedTuple):
    """One kind of load, and which of the servers it goes to, counted from the first port."""

    name: str
    kind: str
    server: int
    at_once: int


_WORK = (
    _Work("upload, 1 stream: Gbit/CPU-s", "upload", 1, 1),
    _Work("upload, 8 streams: Gbit/CPU-s", "upload", 1, 8),
    _Work("32 connections of round trips: CPU, µs", "trips", 0, 32),
    _Work("connections, 16 at a time: CPU, µs", "connections", 0, 16),
)


class _Free:
    """The account of somebody who may have any number of pipes."""

    def take_pipe(self, size: int) -> bool:
        return size > 0

    def give_pipe(self, size: int) -> None: ...

    def miss_pipe(self) -> None:
        raise PyambientError("splice(2) does not work here", "look at seccomp and ulimit -n")


def _splicer(kind: str) -> Splicer | None:
    if kind == _RECEIVE:
        return None
    return Splicer(PipePool(), _Free(), Bulk(0, 0) if kind == _SPLICE else Bulk())


def _relay(kind: str, port: int, to: int) -> None:
    """Be a relay from one port of lo to another."""
    loop, buffers = Loop(), SharedBuffers()
    splicer = _splicer(kind)

    def accepted(near: socket.socket, _peer: SocketAddress) -> None:
        far = socket.socket()
        far.setblocking(False)
        if not connect(far, SocketAddress("127.0.0.1", to)):
            reset(near)
            return
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        PlainRelay(loop, near, far, buffers, splicer).start()

    async def main() -> None:
        sock = socket.create_server(("127.0.0.1", port), backlog=512)
        Listener(loop, sock, accepted, Deadlines(1)).start()
        sys.stdout.write(_READY)
        sys.stdout.flush()
        await trio.sleep_forever()

    loop.run(main)


class _Subject:
    """A relay before each port of the load tool's servers that is asked."""

    def __init__(self, kind: str, place: Placement, program: Path, first_port: int) -> None:
        self._place, self._program, self._first_port = place, program, first_port
        self._relays = [self._start(kind, offset) for offset in (0, 1)]

    def _start(self, kind: str, offset: int) -> subprocess.Popen[str]:
        words = ("--relay", kind, str(self._first_port + offset), str(_APP_PORT + offset))
        process = self._place.start(module(_MODULE, *words), stdout=subprocess.PIPE)
        assert process.stdout is not None  # noqa: S101 - a pipe
        if process.stdout.readline() != _READY:
            raise PyambientError("the relay did not start", "see what it wrote above")
        return process

    def measure(self, client: Placement, work: _Work, seconds: float) -> Sample:
        words = ("127.0.0.1", self._first_port + work.server, work.at_once, seconds)
        load = Load(self._program, client, work.kind, *words)
        load.wait_warm()
        pid, after = self._relays[work.server].pid, [0.0]
        before = cpu_seconds(pid)

        def at_end() -> None:
            after[0] = cpu_seconds(pid)

        sample = load.result(at_end)
        return {**sample, "cpu": after[0] - before}

    def end(self) -> None:
        for process in self._relays:
            process.kill()
            process.wait()


def _measure(options: argparse.Namespace) -> Results:
    program = build(Path("build/bench").absolute())
    cpus = sorted(os.sched_getaffinity(0))
    here = Netns.own()
    apps, relays = (Placement(here, options.inside, cpu) for cpu in (cpus[0], cpus[-1]))
    servers = Load(program, apps, "serve", _APP_PORT)
    servers.wait_warm()
    subjects = {
        kind: _Subject(kind, relays, program, _RELAY_PORT + 10 * number_)
        for number_, kind in enumerate(_KINDS)
    }
    results = Results()
    try:
        for order in turns(tuple(subjects), options.rounds):
            for work in _WORK:
                for kind in order:
                    sample = subjects[kind].measure(apps, work, options.seconds)
                    results.add(work.name, kind, sample)
    finally:
        for subject in subjects.values():
            subject.end()
        servers.end()
    return results


def _value(kind: str) -> Callable[[Sample], float]:
    if kind == "upload":
        return lambda sample: sample["bytes"] * 8e-9 / sample["cpu"]
    return lambda sample: sample["cpu"] / sample["operations"] * 1e6


def _render(results: Results) -> str:
    rows = []
    for work in _WORK:
        value = _value(work.kind)
        figures = (results.median(work.name, kind, value) for kind in _KINDS)
        ratios = (results.ratio(work.name, kind, _RECEIVE, value) for kind in _KINDS[1:])
        rows.append((work.name, *map(number, (*figures, *ratios))))
    return table(("work", *_KINDS, *(f"ratio of {kind}" for kind in _KINDS[1:])), rows)


def _print(options: argparse.Namespace) -> int:
    sys.stdout.write(_render(_measure(options)))
    return 0


def main(arguments: list[str]) -> int:
    parser = options_of(_MODULE, __doc__, seconds=1.0)
    parser.add_argument("--relay", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.relay:
        kind, port, to = options.relay
        _relay(kind, int(port), int(to))
    return behind_walls(_MODULE, arguments, options.inside, lambda: _print(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
