"""Peers that are in the way: they read nothing, say nothing, or a byte a second.

They play both roles and run in a pod's process, until the test ends them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable

from pyambient.hbone.frames import (
    DATA,
    END_STREAM,
    HEADERS,
    MAX_31_BITS,
    PREFACE,
    frame,
    window_update,
)
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from tests.bed import Channel, apps

from .attacker import TIMEOUT, Credentials, context
from .hostile import Outcome, Wire, accepted, settings, tunnel

_DRIP_SECONDS = 1.0
# The first byte of struct tcp_info.
_ESTABLISHED = b"\x01"


def deaf_clients(
    channel: Channel, to: SocketAddress, credentials: Credentials, authority: str, count: int
) -> None:
    """Tunnels that ask for all they can get, and never read: each has streams to an echo server."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            wire = stack.enter_context(tunnel(to, credentials))
            raw = (
                PREFACE
                + settings(initial_window=MAX_31_BITS)
                + window_update(0, MAX_31_BITS - 65_535)
            )
            for stream_id in range(1, 17, 2):
                raw += wire.connect(stream_id, authority)
                raw += frame(DATA, 0, stream_id, bytes(1_000_000))
            wire.send(raw, deaf=True)
        channel.send("deaf")
        channel.receive()


def deaf_crowd(
    channel: Channel, to: SocketAddress, credentials: Credentials, authority: str, count: int
) -> None:
    """Tunnels that never read, one after another, each with little room in its own kernel.

    So most of what each has asked for stays with the proxy. Says how many were cut off
    when asked.
    """
    window = settings(initial_window=MAX_31_BITS) + window_update(0, MAX_31_BITS - 65_535)
    held = []
    for _ in range(count):
        wire = hasty(to, credentials)
        wire.send(PREFACE + window + wire.connect(1, authority), deaf=True)
        wire.send(frame(DATA, 0, 1, bytes(400_000)), deaf=True)
        held.append(wire.tls)
    channel.send("deaf")
    while channel.receive() == "cut off":
        channel.send(sum(map(_cut_off, held)))


def hasty(to: SocketAddress, credentials: Credentials) -> Wire:
    """A tunnel whose socket takes as little as the kernel lets it."""
    tcp = socket.socket(to.family)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    tcp.settimeout(TIMEOUT)
    tcp.connect(to.sockaddr())
    return Wire(context(credentials).wrap_socket(tcp))


def _cut_off(tcp: socket.socket) -> bool:
    """Whether the proxy has let go of it; nothing is read."""
    return tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != _ESTABLISHED


def deaf_server(channel: Channel, host: str, credentials: Credentials) -> None:
    """Lets the client send without end, and never reads a byte of it."""
    own = settings(initial_window=MAX_31_BITS) + window_update(0, MAX_31_BITS - 65_535)
    with accepted(channel, host, credentials, own):
        channel.send("deaf")
        channel.receive()


def tiny_windows(
    to: SocketAddress, credentials: Credentials, authority: str, payload: bytes
) -> Outcome:
    """As a client with a window of one byte: everything comes back a byte at a time."""
    with tunnel(to, credentials) as wire:
        wire.send(PREFACE + settings(initial_window=1) + wire.connect(1, authority))
        wire.send(frame(DATA, END_STREAM, 1, payload))
        return _take_one_by_one(wire, len(payload))


def _take_one_by_one(wire: Wire, count: int) -> Outcome:
    while len(wire.data) < count:
        taken = len(wire.data)
        assert wire.wait_for_data(taken + 1), f"nothing more came after {taken} bytes"
        wire.send(window_update(1, len(wire.data) - taken))
    return wire.outcome(count)


def tiny_window_server(channel: Channel, host: str, credentials: Credentials, count: int) -> None:
    """Likewise as a server; sends the outcome when the client's bytes are here."""
    with accepted(channel, host, credentials, settings(initial_window=1)) as wire:
        channel.send(_take_one_by_one(wire, count))


def drip_hello(channel: Channel, to: SocketAddress, hello: bytes) -> None:
    """A TLS client hello, a byte a second, until the proxy has had enough."""
    with socket.create_connection(to, TIMEOUT) as tcp:
        channel.send("dripping")
        _drip(tcp.sendall, hello, lambda: _gone(tcp))


def drip_preface(channel: Channel, to: SocketAddress, credentials: Credentials) -> None:
    """TLS as it should be, then HTTP/2's preface, a byte a second; sends whether it was cut off."""
    with tunnel(to, credentials) as wire:
        channel.send("dripping")
        _drip(wire.send, PREFACE, lambda: wire.read() or wire.over)
        channel.send(wire.over)


def drip_data(
    channel: Channel, to: SocketAddress, credentials: Credentials, authority: str, payload: bytes
) -> None:
    """A tunnel whose DATA frames come a byte a second; sends the outcome."""
    with tunnel(to, credentials) as wire:
        wire.send(PREFACE + settings() + wire.connect(1, authority))
        assert wire.wait_for(HEADERS), "the tunnel was not opened"
        channel.send("dripping")
        _drip(wire.send, frame(DATA, 0, 1, payload), lambda: wire.over)
        wire.wait_for_data(len(payload))
        channel.send(wire.outcome(len(payload)))


def _drip(send: Callable[[bytes], object], raw: bytes, over: Callable[[], object]) -> None:
    for byte in raw:
        if over():
            return
        send(bytes((byte,)))
        time.sleep(_DRIP_SECONDS)


def _gone(tcp: socket.socket) -> bool:
    """Whether the peer has closed it; it never says anything."""
    tcp.setblocking(False)
    try:
        return not tcp.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True


def crowd(channel: Channel, to: SocketAddress, count: int) -> None:
    """Connections that never begin a handshake; says how many the proxy has closed when asked."""
    apps.allow_many_descriptors()
    held = []
    for _ in range(count):
        tcp = socket.socket(to.family)
        tcp.settimeout(TIMEOUT)
        with contextlib.suppress(OSError):
            tcp.connect(to.sockaddr())
        held.append(tcp)
    channel.send("crowded")
    while channel.receive() == "closed":
        channel.send(sum(map(_gone, held)))


def stalling_server(channel: Channel, host: str, credentials: Credentials, at: str) -> None:
    """Takes connections and goes silent: before "tls", "settings" or the "answer"."""
    made = context(credentials, server=True)
    held = []
    with apps.listener(HBONE_PORT, host) as listening:
        channel.send("listening")
        while True:
            tcp, _ = listening.accept()
            held.append(tcp)
            if at != "tls":
                tls = made.wrap_socket(tcp, server_side=True)
                held.append(tls)
                if at != "settings":
                    tls.sendall(settings())


def client_hello(credentials: Credentials) -> bytes:
    """The first flight of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    session = context(credentials).wrap_bio(incoming, outgoing)
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


def firehose(channel: Channel, to: SocketAddress) -> None:
    """An app that sends until nothing more is taken for a second, and stays."""
    with socket.create_connection(to, TIMEOUT) as tcp:
        tcp.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while True:
                tcp.sendall(bytes(1 << 16))
        channel.send("stuck")
        channel.receive()


def deaf_app(channel: Channel, port: int, first: int = 0) -> None:
    """An app that takes connections, and reads nothing, or so much at first and then nothing."""
    held = []
    with apps.listener(port) as listening:
        listening.settimeout(0.1)
        channel.send("listening")
        while not channel.poll():
            with contextlib.suppress(TimeoutError):
                connection, _ = listening.accept()
                held.append(connection)
                left = first
                while left and (chunk := connection.recv(left)):
                    left -= len(chunk)


def send_and_wait(channel: Channel, to: SocketAddress, payload: bytes) -> None:
    """An app that sends, and stays."""
    with socket.create_connection(to, TIMEOUT) as tcp:
        tcp.sendall(payload)
        channel.receive()
