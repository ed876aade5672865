"""Whether splice(2) pays where bytes are only passed on: `python -m pyambient.bench.engine.splice`.

A relay between plain sockets, as the product has it (one recv and one send by a shared buffer),
against one that moves the bytes through a pipe in the kernel. Everything goes over lo; counted is
the relay's own CPU time.
"""

from __future__ import annotations

import argparse
import fcntl
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
from pyambient.engine.accept import Listener, connect
from pyambient.engine.deadlines import Deadlines
from pyambient.engine.loop import ALL_APP_EVENTS, GONE, IN, OUT, Loop
from pyambient.engine.plain import PlainRelay
from pyambient.engine.relay import reset
from pyambient.engine.tls import SharedBuffers
from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress
from pyambient.netns import Netns

_MODULE = "pyambient.bench.engine.splice"
_RECEIVE, _SPLICE = "recv and send", "splice"
_APP_PORT, _RELAY_PORT = 9000, 9100
_F_SETPIPE_SZ = 1031
_PIPE = 1 << 20
_READY = "ready\n"
# A pipe has 256 places, each of which takes a byte at least: so much and more may not be all.
_PERHAPS_MORE = 256


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


class _Half:
    """One direction: bytes of `source`, of which `held` are in a pipe, on their way to `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source.fileno(), sink
        self.out, self.into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self.into, _F_SETPIPE_SZ, _PIPE)
        self.held = 0
        self.ended = self.queued = self.more = False

    def move(self) -> bool:
        """One pipe's fill at most; whether there may be more."""
        if not self.held and not self.ended:
            self._take()
        if self.held:
            try:
                self.held -= os.splice(self.out, self.sink.fileno(), self.held)
            except BlockingIOError:
                return False
        return self.held == 0 and not self.ended and self.more

    def _take(self) -> None:
        try:
            self.held = os.splice(self.source, self.into, _PIPE, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            self.more = False
            return
        self.more = self.held >= _PERHAPS_MORE
        if not self.held:
            self.ended = True
            self.sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


class SpliceRelay:
    """Two sockets, joined by two pipes; as much of `PlainRelay` as the load needs."""

    def __init__(self, loop: Loop, near: socket.socket, far: socket.socket) -> None:
        self._loop = loop
        self._socks = (near, far)
        self._halves = (_Half(near, far), _Half(far, near))
        self._over = False

    def start(self) -> None:
        for index, sock in enumerate(self._socks):
            self._loop.watch(sock.fileno(), self._handler(index), ALL_APP_EVENTS)

    def _handler(self, index: int) -> Callable[[int], None]:
        def on_events(mask: int) -> None:
            if mask & (IN | GONE):
                self._move(index)
            if mask & OUT and self._halves[1 - index].held:
                self._move(1 - index)

        return on_events

    def _move(self, index: int) -> None:
        if self._over:
            return
        half = self._halves[index]
        half.queued = False
        try:
            again = half.move()
        except OSError:
            self._end()
            return
        if again and not half.queued:
            half.queued = True
            self._loop.call_soon(lambda: self._move(index))
        elif all(half.ended and not half.held for half in self._halves):
            self._end()

    def _end(self) -> None:
        self._over = True
        for sock, half in zip(self._socks, self._halves, strict=True):
            self._loop.forget(sock.fileno())
            half.close()
            sock.close()


def _relay(kind: str, port: int, to: int) -> None:
    """Be a relay from one port of lo to another."""
    loop, buffers = Loop(), SharedBuffers()

    def accepted(near: socket.socket, _peer: SocketAddress) -> None:
        far = socket.socket()
        far.setblocking(False)
        if not connect(far, SocketAddress("127.0.0.1", to)):
            reset(near)
            return
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if kind == _SPLICE:
            SpliceRelay(loop, near, far).start()
        else:
            PlainRelay(loop, near, far, buffers).start()

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
        command = [sys.executable, "-m", _MODULE, *words]
        process = self._place.start(command, stdout=subprocess.PIPE)
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
        for number_, kind in enumerate((_RECEIVE, _SPLICE))
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
        ours, other = (results.median(work.name, kind, value) for kind in (_RECEIVE, _SPLICE))
        ratio = results.ratio(work.name, _SPLICE, _RECEIVE, value)
        rows.append((work.name, *map(number, (ours, other, ratio))))
    return table(("work", _RECEIVE, _SPLICE, "ratio"), rows)


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
