"""The small proxy's port 15053: it says what is wrong with a query, and asks no resolver."""

from __future__ import annotations

import contextlib

import trio

from pyambient.dns.framing import Frames, framed
from pyambient.dns.message import MalformedQueryError, parse_query
from pyambient.netns import Netns
from pyambient.proxy import sockets
from pyambient.proxy.dns.sockets import ANCILLARY_SIZE, arrival, datagram_listener, mark_answers


class SmallForwarder:
    """Bound and listening once it is made; it answers while `serve` runs."""

    def __init__(self, netns: Netns, backend: str, port: int, *, netfilter: bool) -> None:
        self._datagrams = trio.socket.from_stdlib_socket(datagram_listener(netns, backend, port))
        self._listener = trio.socket.from_stdlib_socket(
            sockets.listener(netns, port, netfilter=netfilter)
        )

    def suit(self, backend: str) -> None:
        """The pod is intercepted in another way."""
        mark_answers(self._datagrams, backend)

    async def serve(self) -> None:
        """Answer until it is closed."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_datagrams)
            with contextlib.suppress(trio.ClosedResourceError):
                while True:
                    connection, _ = await self._listener.accept()
                    nursery.start_soon(self._serve_connection, connection)
            nursery.cancel_scope.cancel()

    async def _serve_datagrams(self) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            while True:
                query, ancillary, _, peer = await self._datagrams.recvmsg(1 << 16, ANCILLARY_SIZE)
                arrived = arrival(ancillary)
                if arrived is not None and (answer := _format_error(query)):
                    await self._datagrams.sendmsg([answer], arrived.answering, 0, peer)

    async def _serve_connection(self, connection: trio.socket.SocketType) -> None:
        frames = Frames()
        with connection, contextlib.suppress(OSError):
            while received := await connection.recv(1 << 16):
                frames.feed(received)
                while (query := frames.next()) is not None:
                    await connection.send(framed(_format_error(query)))

    def close(self) -> None:
        self._datagrams.close()
        self._listener.close()

    def __repr__(self) -> str:
        return f"<SmallForwarder fd {self._datagrams.fileno()}>"


def _format_error(query: bytes) -> bytes:
    """What a forwarder answers by itself to what is no query; empty to what is one."""
    try:
        parse_query(query)
    except MalformedQueryError as error:
        return error.answer
    return b""
