"""The apps of the pods: ready-made functions for `BedPod.run` and `BedPod.spawn`.

They are what a test must be able to trust, so they are plain blocking sockets and one selector
loop, and know nothing of pyambient but its address values. A server answers the question
"accepted" with what it saw; it does not report unasked, because a test that does not read would
block it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyambient.model.address import SocketAddress, from_sockaddr

from .process import Channel

CHUNK = 1 << 16
_BACKLOG = 4096


@dataclass(frozen=True, slots=True)
class Accepted:
    """One connection as a server sees it: getpeername and getsockname."""

    peer: SocketAddress
    local: SocketAddress


@dataclass(frozen=True, slots=True)
class Exchange:
    """What became of one client connection; `errno` is None when nothing failed.

    `stage` is where it failed ("connect", "send", "receive"), or "done". `elapsed` is in seconds.
    """

    data: bytes
    local: SocketAddress | None
    peer: SocketAddress | None
    errno: int | None
    stage: str
    elapsed: float

    @property
    def failed(self) -> bool:
        return self.errno is not None


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What a client sets on its socket before it connects."""

    device: str | None = None
    mark: int | None = None
    source: str | None = None
    v4_mapped: bool = False
    timeout: float = 10.0

    def socket(self, destination: SocketAddress, kind: int = socket.SOCK_STREAM) -> socket.socket:
        family = socket.AF_INET6 if self.v4_mapped else destination.family
        made = socket.socket(family, kind)
        made.settimeout(self.timeout)
        if self.device:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.device.encode())
        if self.mark is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, self.mark)
        if self.source:
            made.bind((self.source, 0))
        return made

    def sockaddr(self, destination: SocketAddress) -> tuple[Any, ...]:
        if self.v4_mapped:
            return (f"::ffff:{destination.ip}", destination.port)
        return destination.sockaddr()


def listener(port: int, host: str = "::", kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A listening socket; "::" takes both families."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.bind((host, port))
    if kind == socket.SOCK_STREAM:
        made.listen(_BACKLOG)
    return made


def allow_many_descriptors() -> None:
    """Raise the soft limit of this process only: pyambient has to see to its own."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@dataclass(slots=True)
class _Served:
    """One connection of the echo server: bytes that wait to go back."""

    socket: socket.socket
    unsent: bytearray = field(default_factory=bytearray)
    ended: bool = False


class _EchoServer:
    """Sends back what it gets, at once or (`at_eof`) after the client's end of stream."""

    def __init__(self, channel: Channel, listening: socket.socket, *, at_eof: bool) -> None:
        self.channel = channel
        self.listening = listening
        self.at_eof = at_eof
        self.accepted: list[Accepted] = []
        self.selector = selectors.DefaultSelector()
        self.running = True

    def serve(self) -> int:
        self.listening.setblocking(False)
        self.selector.register(self.listening, selectors.EVENT_READ, self._accept)
        self.selector.register(self.channel, selectors.EVENT_READ, self._command)
        self.channel.send("listening")
        while self.running:
            for key, events in self.selector.select():
                key.data(events)
        return len(self.accepted)

    def _command(self, _: int) -> None:
        try:
            command = self.channel.receive()
        except EOFError:
            command = "stop"
        if command == "accepted":
            self.channel.send(list(self.accepted))
        self.running = command != "stop"

    def _accept(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            made, peer = self.listening.accept()
            self.accepted.append(Accepted(from_sockaddr(peer), from_sockaddr(made.getsockname())))
            made.setblocking(False)
            served = _Served(made)
            self.selector.register(made, selectors.EVENT_READ, lambda e: self._move(served, e))

    def _move(self, served: _Served, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(served)
            if served.unsent and (served.ended or not self.at_eof):
                del served.unsent[: served.socket.send(served.unsent)]
        except BlockingIOError:
            pass
        except OSError:
            served.ended = True
            served.unsent.clear()
        self._settle(served)

    def _read(self, served: _Served) -> None:
        data = served.socket.recv(CHUNK)
        served.unsent += data
        served.ended = not data

    def _settle(self, served: _Served) -> None:
        """Wait for what comes next, or close when both directions are done."""
        if served.ended and not served.unsent:
            self.selector.unregister(served.socket)
            served.socket.close()
            return
        wanted = 0 if served.ended else selectors.EVENT_READ
        if served.unsent and (served.ended or not self.at_eof):
            wanted |= selectors.EVENT_WRITE
        key = self.selector.get_key(served.socket)
        if key.events != wanted:
            self.selector.modify(served.socket, wanted, key.data)


def echo_server(channel: Channel, port: int, host: str = "::", *, at_eof: bool = False) -> int:
    """Serve until told "stop"; says "listening" first, answers "accepted" with [Accepted].

    `at_eof` keeps the answer back until the client has half-closed.
    """
    allow_many_descriptors()
    with listener(port, host) as listening:
        return _EchoServer(channel, listening, at_eof=at_eof).serve()


def request(
    destination: SocketAddress, data: bytes = b"hello", options: ClientOptions | None = None
) -> Exchange:
    """Connect, send `data`, half-close, read to the end of stream."""
    chosen = options or ClientOptions()
    started = time.monotonic()
    stage, received, names = "connect", bytearray(), (None, None)
    failure: int | None = None
    try:
        with chosen.socket(destination) as connection:
            connection.connect(chosen.sockaddr(destination))
            names = (from_sockaddr(connection.getsockname()), _peer(connection))
            stage = "send"
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            stage = "receive"
            while chunk := connection.recv(CHUNK):
                received += chunk
            stage = "done"
    except OSError as error:
        failure = _number(error)
    elapsed = time.monotonic() - started
    return Exchange(bytes(received), names[0], names[1], failure, stage, elapsed)


def _peer(connection: socket.socket) -> SocketAddress | None:
    """None where the peer has reset the connection already: sending will tell."""
    try:
        return from_sockaddr(connection.getpeername())
    except OSError:
        return None


def _number(error: OSError) -> int:
    """The errno; a socket's own timeout has none and counts as ETIMEDOUT."""
    return errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno or errno.EIO


def hold(
    channel: Channel,
    destination: SocketAddress,
    count: int,
    options: ClientOptions | None = None,
) -> None:
    """Open `count` connections, exchange a byte on each, and keep them.

    Sends {index: errno} of those that failed when all are open, and again after each "ping";
    ends at "stop".
    """
    allow_many_descriptors()
    chosen = options or ClientOptions()
    held: dict[int, socket.socket] = {}
    failures: dict[int, int] = {}
    for index in range(count):
        held[index] = connection = chosen.socket(destination)
        _attempt(failures, index, lambda c=connection: c.connect(chosen.sockaddr(destination)))
    _ping(held, failures)
    channel.send(failures)
    while channel.receive() == "ping":
        _ping(held, failures)
        channel.send(failures)
    for connection in held.values():
        connection.close()


def _attempt(failures: dict[int, int], index: int, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        failures.setdefault(index, _number(error))


def _ping(held: dict[int, socket.socket], failures: dict[int, int]) -> None:
    """Exchange a byte on all at once: send on each, then read from each."""
    alive = {index: one for index, one in held.items() if index not in failures}
    for index, connection in alive.items():
        _attempt(failures, index, lambda c=connection: c.sendall(b"x"))
    for index, connection in alive.items():
        if index not in failures:
            _attempt(failures, index, lambda c=connection: _read_byte(c))


def _read_byte(connection: socket.socket) -> None:
    if connection.recv(1) != b"x":
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def send_syn(to: SocketAddress, port: int, device: str | None = None) -> None:
    """One, from this port, without waiting what becomes of it."""
    with ClientOptions(device=device).socket(to) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("", port))
        client.setblocking(False)
        assert client.connect_ex(to.sockaddr())  # under way, or refused


def send_datagram(to: SocketAddress, port: int, payload: bytes, device: str | None = None) -> None:
    """One, from this port; that it cannot be sent may be told."""
    with ClientOptions(device=device).socket(to, socket.SOCK_DGRAM) as client:
        client.bind(("", port))
        with contextlib.suppress(OSError):
            client.sendto(payload, to.sockaddr())


def udp_echo(channel: Channel, port: int, host: str = "::") -> None:
    """Send every datagram back until told "stop"; says "listening" first."""
    with listener(port, host, socket.SOCK_DGRAM) as serving, selectors.DefaultSelector() as ready:
        ready.register(serving, selectors.EVENT_READ)
        ready.register(channel, selectors.EVENT_READ)
        channel.send("listening")
        while True:
            for key, _ in ready.select():
                if key.fileobj is channel:
                    return
                data, peer = serving.recvfrom(CHUNK)
                serving.sendto(data, peer)


def udp_request(
    destination: SocketAddress, data: bytes = b"hello", options: ClientOptions | None = None
) -> Exchange:
    """Send one datagram, wait for one back."""
    chosen = options or ClientOptions(timeout=2)
    started = time.monotonic()
    with chosen.socket(destination, socket.SOCK_DGRAM) as client:
        try:
            client.sendto(data, chosen.sockaddr(destination))
            answer, peer = client.recvfrom(CHUNK)
        except OSError as error:
            elapsed = time.monotonic() - started
            return Exchange(b"", None, None, _number(error), "receive", elapsed)
        local = from_sockaddr(client.getsockname())
        elapsed = time.monotonic() - started
        return Exchange(answer, local, from_sockaddr(peer), None, "done", elapsed)
