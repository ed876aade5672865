"""In-memory ends, raw frames, and sinks and owners that write down what they hear."""

from __future__ import annotations

import struct
from typing import Any

import h2.config
import h2.connection
import h2.events
import hpack
import pytest

from pyambient.hbone import (
    Connection,
    ConnectRequest,
    Headers,
    LocalSettings,
    OutputPool,
    RemoteProtocolError,
    Role,
    Stream,
)
from pyambient.hbone.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)

AUTHORITY = "10.0.0.2:8080"
REQUEST = ConnectRequest(AUTHORITY)
CONNECT = ((":method", "CONNECT"), (":authority", AUTHORITY))
OK = ((":status", "200"),)


class Sink:
    """Writes down a stream's life; credits at once unless told to hold."""

    def __init__(self, connection: Connection | None = None, *, hold: bool = False) -> None:
        self.connection = connection
        self.hold = hold
        self.stream: Stream | None = None
        self.events: list[Any] = []
        self.received = bytearray()
        self.on_writable: Any = None

    def answered(self, status: int, headers: Headers) -> None:
        self.events.append(("answered", status, headers))

    def data(self, view: memoryview) -> None:
        self.received += view
        if not self.hold and self.stream is not None:
            self.stream.connection.credit(self.stream, len(view))

    def ended(self) -> None:
        self.events.append("ended")

    def reset(self, code: int) -> None:
        self.events.append(("reset", code))

    def writable(self) -> None:
        self.events.append("writable")
        if self.on_writable is not None:
            self.on_writable()


class Owner:
    """Writes down what a connection says; a server's accepts every request unless told not to."""

    def __init__(self, *, accept: bool = True, hold: bool = False) -> None:
        self.accept = accept
        self.hold = hold
        self.events: list[Any] = []
        self.requests: list[ConnectRequest] = []
        self.streams: list[Stream] = []
        self.sinks: dict[int, Sink] = {}

    def requested(self, stream: Stream, request: ConnectRequest) -> None:
        self.requests.append(request)
        self.streams.append(stream)
        if self.accept:
            sink = self.sinks[stream.id] = Sink(hold=self.hold)
            sink.stream = stream
            stream.sink = sink
            stream.connection.accept(stream)

    def refused(self, stream_id: int, status: int, why: str) -> None:
        self.events.append(("refused", stream_id, status, why))

    def settled(self) -> None:
        self.events.append("settled")

    def drained(self) -> None:
        self.events.append("drained")

    def goaway(self, code: int) -> None:
        self.events.append(("goaway", code))


class Clock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take(connection: Connection) -> bytes:
    """All that a connection has to send."""
    out = bytearray()
    while len(view := connection.pending):
        out += view
        connection.sent(len(view))
    return bytes(out)


def give(connection: Connection, raw: bytes) -> None:
    connection.receive(memoryview(raw))


def send(connection: Connection, stream: Stream, payload: bytes) -> int:
    """Reserve, fill and commit as far as the windows and the output go."""
    done = 0
    while done < len(payload):
        view = connection.reserve(stream, len(payload) - done)
        if not len(view):
            break
        view[:] = payload[done : done + len(view)]
        connection.commit(stream, len(view))
        done += len(view)
    return done


class Pair:
    """A client and a server of ours, joined in memory."""

    def __init__(
        self,
        *,
        accept: bool = True,
        hold: bool = False,
        settings: LocalSettings | None = None,
        server_settings: LocalSettings | None = None,
        output_size: int = 512 << 10,
    ) -> None:
        self.pool = OutputPool(output_size)
        self.client_owner = Owner()
        self.server_owner = Owner(accept=accept, hold=hold)
        settings = settings or LocalSettings()
        self.client = Connection(Role.CLIENT, self.client_owner, self.pool, settings)
        self.server = Connection(
            Role.SERVER, self.server_owner, self.pool, server_settings or settings
        )
        self.client.start()
        self.server.start()
        self.run()

    def run(self) -> None:
        """Carry bytes to and fro until both are silent."""
        for _ in range(10_000):
            forth, back = take(self.client), take(self.server)
            if not forth and not back:
                return
            give(self.server, forth)
            give(self.client, back)
        raise AssertionError("the two ends never fall silent")

    def open(self, request: ConnectRequest = REQUEST, *, hold: bool = False) -> tuple[Stream, Sink]:
        """A client stream with its sink, the CONNECT not yet carried over."""
        sink = Sink(hold=hold)
        stream = sink.stream = self.client.open(request, sink)
        return stream, sink

    def tunnel(self) -> tuple[Stream, Sink, Stream, Sink]:
        """An open tunnel: the client's stream and sink, the server's stream and sink."""
        stream, sink = self.open()
        self.run()
        assert sink.events == [("answered", 200, ())]
        return stream, sink, self.server.streams[stream.id], self.server_owner.sinks[stream.id]


class Peer:
    """One connection of ours, driven by hand-made frames."""

    def __init__(
        self,
        role: Role,
        *,
        accept: bool = True,
        hold: bool = False,
        settings: LocalSettings | None = None,
        peer_settings: bytes = b"",
    ) -> None:
        self.clock = Clock()
        self.owner = Owner(accept=accept, hold=hold)
        self.connection = Connection(
            role, self.owner, OutputPool(), settings or LocalSettings(), self.clock
        )
        self.encoder = hpack.Encoder()
        self.connection.start()
        self.sent = list(cut(take(self.connection).removeprefix(PREFACE)))
        if role is Role.SERVER:
            give(self.connection, PREFACE)
        self.give(frame(SETTINGS, 0, 0, peer_settings))

    def give(self, raw: bytes) -> list[tuple[int, int, int, bytes]]:
        """Feed bytes; return the frames that we answer with."""
        give(self.connection, raw)
        return self.frames()

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """(type, flags, stream id, payload) of every frame sent since the last call."""
        return list(cut(take(self.connection)))

    def refuses(self, raw: bytes) -> tuple[int, str]:
        """Feed bytes that must end the connection; return the error's code and text.

        Its GOAWAY has the same code, every sink was reset, and more bytes are ignored.
        """
        with pytest.raises(RemoteProtocolError) as caught:
            give(self.connection, raw)
        error = caught.value
        kind, _, stream_id, payload = self.frames()[-1]
        assert (kind, stream_id) == (7, 0)
        assert struct.unpack_from(">L", payload, 4) == (error.code,)
        assert self.connection.closed
        assert not self.connection.streams
        give(self.connection, raw)
        return error.code, error.text

    def block(self, fields: Any) -> bytes:
        """A header block with whatever the encoder's dynamic table makes of it."""
        return self.encoder.encode(list(fields))

    def headers(self, stream_id: int, fields: Any, *, end: bool = False) -> bytes:
        flags = END_HEADERS | (END_STREAM if end else 0)
        return frame(HEADERS, flags, stream_id, self.block(fields))

    def connect(self, stream_id: int = 1) -> bytes:
        return self.headers(stream_id, CONNECT)

    def opened(self) -> tuple[Stream, Sink]:
        """Client: a stream that the server has answered with 200."""
        sink = Sink()
        stream = sink.stream = self.connection.open(REQUEST, sink)
        self.give(self.headers(stream.id, OK))
        return stream, sink

    def accepted(self, stream_id: int = 1) -> tuple[Stream, Sink]:
        """Server: a stream that the owner has accepted."""
        self.give(self.connect(stream_id))
        return self.connection.streams[stream_id], self.owner.sinks[stream_id]


def client(**options: Any) -> Peer:
    return Peer(Role.CLIENT, **options)


def server(**options: Any) -> Peer:
    return Peer(Role.SERVER, **options)


def cut(raw: bytes) -> Any:
    """The frames in `raw`, which must be whole ones."""
    while raw:
        high, low, kind, flags, stream_id = struct.unpack_from(">HBBBL", raw)
        length = high << 8 | low
        assert len(raw) >= 9 + length, "a frame is cut"
        yield kind, flags, stream_id, raw[9 : 9 + length]
        raw = raw[9 + length :]


def data(stream_id: int, payload: bytes = b"", *, end: bool = False) -> bytes:
    return frame(DATA, END_STREAM if end else 0, stream_id, payload)


def padded_data(stream_id: int, payload: bytes, padding: int, *, end: bool = False) -> bytes:
    flags = PADDED | (END_STREAM if end else 0)
    return frame(DATA, flags, stream_id, bytes((padding,)) + payload + bytes(padding))


def continuation(stream_id: int, fragment: bytes, *, end: bool = False) -> bytes:
    return frame(CONTINUATION, END_HEADERS if end else 0, stream_id, fragment)


def rst(stream_id: int, code: int = 8) -> bytes:
    return frame(RST_STREAM, 0, stream_id, struct.pack(">L", code))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, struct.pack(">L", increment))


def goaway(last_stream_id: int, code: int = 0) -> bytes:
    return frame(7, 0, 0, struct.pack(">LL", last_stream_id, code))


def setting(code: int, value: int) -> bytes:
    return struct.pack(">HL", code, value)


def settings_frame(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(setting(*pair) for pair in pairs))


class H2Peer:
    """A plain hyper-h2 connection as the other end: nothing of ours in it."""

    def __init__(self, connection: Connection, *, is_client: bool) -> None:
        self.ours = connection
        config = h2.config.H2Configuration(client_side=is_client, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.events: list[h2.events.Event] = []
        self.received: dict[int, bytearray] = {}
        self.credit = True
        self.ours.start()
        self.h2.initiate_connection()
        self.run()

    def run(self) -> None:
        """Carry bytes to and fro until both are silent."""
        for _ in range(100_000):
            forth, back = take(self.ours), self.h2.data_to_send()
            if not forth and not back:
                return
            for event in self.h2.receive_data(forth):
                self._note(event)
            give(self.ours, back)
        raise AssertionError("the two ends never fall silent")

    def _note(self, event: h2.events.Event) -> None:
        self.events.append(event)
        if isinstance(event, h2.events.DataReceived):
            self.received.setdefault(event.stream_id, bytearray()).extend(event.data)
            if self.credit and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)

    def of(self, kind: type[Any]) -> list[Any]:
        """The events of one type."""
        return [event for event in self.events if type(event) is kind]

    def send(self, stream_id: int, payload: bytes) -> None:
        """Send all of `payload`, as the windows open."""
        while payload:
            room = self.h2.local_flow_control_window(stream_id)
            size = min(room, self.h2.max_outbound_frame_size, len(payload))
            assert size > 0, "the window never opens"
            self.h2.send_data(stream_id, payload[:size])
            payload = payload[size:]
            self.run()
