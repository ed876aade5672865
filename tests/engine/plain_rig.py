"""Plain relays between real sockets, and the account that their pipes go on."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import trio

from pyambient.engine.loop import Loop
from pyambient.engine.plain import PlainRelay
from pyambient.engine.splicing import Splicer
from pyambient.engine.tls import SharedBuffers
from tests.bed.patience import patience

from .rig import HOSTS, tcp_pair


class Ledger:
    """What pipes there are on this account now and were at most, and how many there were not."""

    def __init__(self, allowed: int = 100) -> None:
        self.allowed = allowed
        self.pipes = self.most = self.taken = self.missed = 0

    def take_pipe(self, size: int) -> bool:
        if self.pipes >= self.allowed:
            self.miss_pipe()
            return False
        assert size > 0
        self.pipes += 1
        self.taken += 1
        self.most = max(self.most, self.pipes)
        return True

    def give_pipe(self, size: int) -> None:
        assert size > 0
        self.pipes -= 1

    def miss_pipe(self) -> None:
        self.missed += 1


class PlainRig:
    """Relays on one loop; `open()` gives the apps' sockets of one more."""

    def __init__(self, loop: Loop, splicer: Splicer | None) -> None:
        self.loop = loop
        self.splicer = splicer
        self.buffers = SharedBuffers()
        self.relays: list[PlainRelay] = []
        self.finished: list[PlainRelay] = []
        self._apps: list[socket.socket] = []

    def open(self, host: str = HOSTS["v4"]) -> tuple[socket.socket, socket.socket]:
        """The client's and the server's socket of a relayed connection."""
        (app, near), (server, far) = tcp_pair(host), tcp_pair(host)
        relay = PlainRelay(self.loop, near, far, self.buffers, self.splicer)
        relay.on_finished = self.finished.append
        relay.start()
        self.relays.append(relay)
        self._apps += (app, server)
        return app, server

    async def use(self, function: Callable[..., object], *args: object) -> None:
        """Run it in a thread, while the loop goes on."""
        await trio.to_thread.run_sync(function, *args)

    async def wait_finished(self) -> None:
        while len(self.finished) < len(self.relays):  # noqa: ASYNC110 - a relay has no event
            await trio.sleep(0.01)

    def close(self) -> None:
        for app in self._apps:
            app.close()


def relaying(test: Callable[[PlainRig], Awaitable[None]], splicer: Splicer | None) -> None:
    """Run `await test(rig)`; bounded in time."""
    loop = Loop()
    rig = PlainRig(loop, splicer)

    async def main() -> None:
        with trio.fail_after(patience(30)):
            await test(rig)

    try:
        loop.run(main)
    finally:
        rig.close()


def relayed(
    use: Callable[[socket.socket, socket.socket], object],
    splicer: Splicer | None = None,
    host: str = HOSTS["v4"],
) -> PlainRelay:
    """Run `use(app, server)` in a thread, with a relay between the two sockets, to its end."""

    async def test(rig: PlainRig) -> None:
        await rig.use(use, *rig.open(host))
        await rig.wait_finished()
        assert rig.finished == rig.relays
        made.append(rig.relays[0])

    made: list[PlainRelay] = []
    relaying(test, splicer)
    return made[0]


def read_all(sock: socket.socket) -> bytes:
    chunks = []
    while chunk := sock.recv(1 << 16):
        chunks.append(chunk)
    return b"".join(chunks)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or what comes before the end; TimeoutError where no more come."""
    received = bytearray()
    while len(received) < count and (chunk := sock.recv(count - len(received))):
        received += chunk
    return bytes(received)
