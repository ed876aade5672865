"""A peer with a good certificate and bad intentions: real TLS, frames by hand, in both roles.

`flood` and `flooding_server` play one of FLOODS against the proxy and report what it said to that.
They run in a pod's process.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import hpack

from pyambient.hbone import ErrorCode
from pyambient.hbone.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    MAX_31_BITS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    frame,
    window_update,
)
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from tests.bed import Channel, apps

from .attacker import TIMEOUT, Credentials, connect_headers, context


def settings(**values: int) -> bytes:
    codes = {"initial_window": 4, "max_frame": 5}
    payload = b"".join(struct.pack(">HL", codes[name], value) for name, value in values.items())
    return frame(SETTINGS, 0, 0, payload)


@dataclass(slots=True)
class Outcome:
    """What the proxy said: the code of its GOAWAY, the streams it reset, how it ended."""

    steps: int = 0
    goaway: int | None = None
    resets: list[tuple[int, int]] = field(default_factory=list)
    data: bytes = b""
    alive: bool = False


class Wire:
    """A TLS connection that sends whatever it is given, and reads meanwhile."""

    def __init__(self, tls: ssl.SSLSocket, *, server: bool = False) -> None:
        self.tls = tls
        self.server = server
        self._preface_left = len(PREFACE) if server else 0
        tls.setblocking(False)
        self.encoder = hpack.Encoder()
        self.over = False
        self.frames: list[tuple[int, int, int, bytes]] = []
        self.data = bytearray()
        self.received = bytearray()

    def headers(self, stream_id: int, *fields: tuple[str, str], flags: int = END_HEADERS) -> bytes:
        return frame(HEADERS, flags, stream_id, self.encoder.encode(list(fields)))

    def connect(self, stream_id: int, authority: str, flags: int = END_HEADERS) -> bytes:
        return self.headers(stream_id, *connect_headers(authority), flags=flags)

    def send(self, raw: bytes, *, deaf: bool = False) -> bool:
        """Send all of it; False when the peer has had enough. `deaf` never reads, and waits."""
        view = memoryview(raw)
        while view and not self.over:
            if not deaf:
                self.read()
            try:
                view = view[self.tls.send(view) :]
            except ssl.SSLWantWriteError:
                ready = select.select([] if deaf else [self.tls], [self.tls], [], TIMEOUT)
                if not any(ready):
                    return False
            except OSError:
                self.over = True
        return not self.over

    def read(self) -> None:
        """What is there now."""
        try:
            while chunk := self.tls.recv(1 << 16):
                self.received += chunk
                self._cut()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            pass
        self.over = True

    def _cut(self) -> None:
        """Note the frames that are whole by now."""
        raw, at = self.received, self._preface_left
        while at + 9 <= len(raw):
            high, low, kind, flags, stream_id = struct.unpack_from(">HBBBL", raw, at)
            after = at + 9 + (high << 8 | low)
            if after > len(raw):
                break
            self.frames.append((kind, flags, stream_id, bytes(raw[at + 9 : after])))
            if kind == DATA:
                self.data += raw[at + 9 : after]
            at = after
        if at <= len(raw):
            self._preface_left = 0
            del raw[:at]

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Read until it is true; False if the connection ends before, or time."""
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if self.over or time.monotonic() > deadline:
                return False
            select.select([self.tls], [], [], 0.2)
            self.read()
        return True

    def wait_for_data(self, count: int) -> bool:
        """Read until so many bytes of payload have come."""
        return self.wait_until(lambda: len(self.data) >= count)

    def wait_for(self, kind: int) -> bool:
        """Read until a frame of that type has come."""
        return self.wait_until(lambda: any(frame_[0] == kind for frame_ in self.frames))

    def answers(self) -> bool:
        """Whether a PING is answered."""
        self.send(frame(PING, 0, 0, b"at last!"))
        return self.wait_until(lambda: (PING, ACK, 0, b"at last!") in self.frames)

    def outcome(self, steps: int) -> Outcome:
        found = Outcome(steps, data=bytes(self.data))
        for kind, _, stream_id, payload in self.frames:
            if kind == GOAWAY:
                found.goaway = struct.unpack_from(">L", payload, 4)[0]
            elif kind == RST_STREAM:
                found.resets.append((stream_id, struct.unpack(">L", payload)[0]))
        return found


Step = Callable[[Wire, str, int], bytes]


@dataclass(frozen=True, slots=True)
class Flood:
    """`step(wire, authority, n)` is sent for n = 0, 1, ...; `code` is what the GOAWAY must say.

    None: it costs stream 1, an open tunnel, and no more. The connection has to answer then.
    """

    step: Step
    code: int | None
    roles: tuple[str, ...] = ("client", "server")
    steps: int = 6000


def _again(raw: bytes, first: bytes = b"") -> Step:
    return lambda _wire, _authority, n: raw if n else first or raw


def _rapid_reset(wire: Wire, authority: str, n: int) -> bytes:
    """Streams that are given up at once (CVE-2023-44487)."""
    stream_id = 2 * n + 3
    return wire.connect(stream_id, authority) + frame(RST_STREAM, 0, stream_id, bytes(4))


def _resets_of_ours(wire: Wire, authority: str, n: int) -> bytes:
    """Streams that the proxy is made to reset, each by a mistake (CVE-2025-8671)."""
    stream_id = 2 * n + 3
    return wire.connect(stream_id, authority, END_HEADERS | END_STREAM) + window_update(
        stream_id, 0
    )


def _header_bomb(wire: Wire, authority: str, n: int) -> bytes:
    """A few bytes that stand for a list of 80 KiB: one large field, said twenty times."""
    large = [("baggage", "x" * 3900)] * (20 if n else 1)
    if wire.server:
        return wire.headers(1, *large)
    return wire.headers(2 * n + 3, *connect_headers(authority), *large)


_PIECE = bytes(16_000)
FLOODS = {
    "rapid reset": Flood(_rapid_reset, ErrorCode.ENHANCE_YOUR_CALM, ("client",)),
    "resets of ours": Flood(_resets_of_ours, ErrorCode.ENHANCE_YOUR_CALM, ("client",)),
    "SETTINGS": Flood(_again(settings(initial_window=70_000)), ErrorCode.ENHANCE_YOUR_CALM),
    "SETTINGS acknowledgements": Flood(
        _again(frame(SETTINGS, ACK, 0)), ErrorCode.ENHANCE_YOUR_CALM
    ),
    "PING": Flood(_again(frame(PING, 0, 0, bytes(8))), ErrorCode.ENHANCE_YOUR_CALM),
    "PING answers": Flood(_again(frame(PING, ACK, 0, bytes(8))), ErrorCode.ENHANCE_YOUR_CALM),
    "PRIORITY": Flood(_again(frame(2, 0, 1, bytes(5))), ErrorCode.ENHANCE_YOUR_CALM),
    "unknown frames": Flood(_again(frame(0x55, 0, 1, bytes(100))), ErrorCode.ENHANCE_YOUR_CALM),
    "empty DATA": Flood(_again(frame(DATA, 0, 1)), ErrorCode.ENHANCE_YOUR_CALM),
    "GOAWAY": Flood(
        _again(frame(GOAWAY, 0, 0, struct.pack(">LL", MAX_31_BITS, 0))), ErrorCode.ENHANCE_YOUR_CALM
    ),
    "CONTINUATION": Flood(
        _again(frame(CONTINUATION, 0, 1), frame(HEADERS, 0, 1)), ErrorCode.ENHANCE_YOUR_CALM
    ),
    "a header block without end": Flood(
        _again(frame(CONTINUATION, 0, 1, _PIECE), frame(HEADERS, 0, 1, _PIECE)),
        ErrorCode.ENHANCE_YOUR_CALM,
    ),
    "a header list that inflates": Flood(_header_bomb, ErrorCode.ENHANCE_YOUR_CALM),
    "a header frame over 64 KiB": Flood(
        _again(frame(HEADERS, 4, 1, bytes(70_000))), ErrorCode.ENHANCE_YOUR_CALM
    ),
    "WINDOW_UPDATE by 0": Flood(_again(window_update(0, 0)), ErrorCode.PROTOCOL_ERROR),
    "WINDOW_UPDATE that overflows": Flood(
        _again(window_update(0, MAX_31_BITS)), ErrorCode.FLOW_CONTROL_ERROR
    ),
    "a stream's window that overflows": Flood(_again(window_update(1, MAX_31_BITS)), None),
    "a frame over 1 MiB": Flood(_again(b"\x10\0\1\0\0\0\0\0\1"), ErrorCode.FRAME_SIZE_ERROR),
    "DATA on an idle stream": Flood(_again(frame(DATA, 0, 99, b"x")), ErrorCode.PROTOCOL_ERROR),
    "DATA after the end": Flood(
        _again(frame(DATA, 0, 1, _PIECE), frame(DATA, END_STREAM, 1) + frame(DATA, 0, 1, _PIECE)),
        None,
        steps=600,
    ),
    "DATA beyond the window": Flood(
        _again(frame(DATA, 0, 1, _PIECE)), None, ("server",), steps=2000
    ),
    "padding longer than the frame": Flood(
        _again(frame(DATA, 8, 1, b"\xff" + bytes(10))), ErrorCode.PROTOCOL_ERROR
    ),
}


def _play(wire: Wire, authority: str, name: str) -> Outcome:
    """The flood on a connection whose stream 1 is open."""
    chosen, steps = FLOODS[name], 0
    while steps < chosen.steps and wire.send(chosen.step(wire, authority, steps)):
        steps += 1
    alive = wire.answers()
    found = wire.outcome(steps)
    found.alive = alive
    return found


@contextlib.contextmanager
def tunnel(to: SocketAddress, credentials: Credentials) -> Iterator[Wire]:
    with (
        socket.create_connection(to, TIMEOUT) as tcp,
        context(credentials).wrap_socket(tcp) as tls,
    ):
        yield Wire(tls)


def flood(to: SocketAddress, credentials: Credentials, authority: str, name: str) -> Outcome:
    """As a client: open one connection, then play the flood."""
    with tunnel(to, credentials) as wire:
        wire.send(PREFACE + settings() + wire.connect(1, authority))
        assert wire.wait_for(HEADERS), "the tunnel was not opened"
        return _play(wire, authority, name)


def flooding_server(channel: Channel, host: str, credentials: Credentials, name: str) -> None:
    """As a server: take one connection and its first request, then play the flood."""
    with accepted(channel, host, credentials) as wire:
        channel.send(_play(wire, "", name))


@contextlib.contextmanager
def accepted(
    channel: Channel, host: str, credentials: Credentials, own: bytes = b""
) -> Iterator[Wire]:
    """A connection of the proxy's whose first request was answered 200; `own` are our SETTINGS."""
    with apps.listener(HBONE_PORT, host) as listening:
        channel.send("listening")
        tcp, _ = listening.accept()
    tcp.settimeout(TIMEOUT)
    with tcp, context(credentials, server=True).wrap_socket(tcp, server_side=True) as tls:
        wire = Wire(tls, server=True)
        wire.send(own or settings())
        assert wire.wait_for(HEADERS), "nothing was asked"
        wire.send(wire.headers(1, (":status", "200")))
        yield wire
