"""Frames that must not be: which cost the peer a stream, and which the connection."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from pyambient.hbone import Connection, ErrorCode, OutputPool, RemoteProtocolError, Role
from pyambient.hbone.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    WITH_PRIORITY,
    frame,
)

from .helpers import (
    OK,
    REQUEST,
    Owner,
    Peer,
    Sink,
    client,
    continuation,
    data,
    give,
    goaway,
    padded_data,
    rst,
    server,
    setting,
    settings_frame,
    take,
    window_update,
)

PROTOCOL = ErrorCode.PROTOCOL_ERROR
SIZE = ErrorCode.FRAME_SIZE_ERROR
CLOSED = ErrorCode.STREAM_CLOSED
FLOW = ErrorCode.FLOW_CONTROL_ERROR
COMPRESSION = ErrorCode.COMPRESSION_ERROR
CALM = ErrorCode.ENHANCE_YOUR_CALM


def _overlong(kind: int) -> bytes:
    """The header of a frame of 1 MiB + 1."""
    return struct.pack(">HBBBL", 0x1000, 1, kind, 0, 1)


FATAL = {
    "overlong DATA": (_overlong(0), SIZE),
    "overlong HEADERS": (_overlong(1), SIZE),
    "overlong unknown frame": (_overlong(0x55), SIZE),
    "DATA on stream 0": (data(0, b"x"), PROTOCOL),
    "DATA on an idle stream": (data(5, b"x"), PROTOCOL),
    "DATA on an even stream": (data(2, b"x"), PROTOCOL),
    "padding as long as the frame": (frame(0, PADDED, 1, b"\x04abc"), PROTOCOL),
    "padding longer than the frame": (frame(0, PADDED, 1, b"\xffabc"), PROTOCOL),
    "padded DATA without the length": (frame(0, PADDED, 1), SIZE),
    "HEADERS on stream 0": (frame(HEADERS, END_HEADERS, 0, b"\x88"), PROTOCOL),
    "HEADERS on an even stream": (frame(HEADERS, END_HEADERS, 4, b"\x88"), PROTOCOL),
    "HEADERS padded too much": (frame(HEADERS, END_HEADERS | PADDED, 1, b"\x02\x88"), PROTOCOL),
    "HEADERS without their padding": (frame(HEADERS, END_HEADERS | PADDED, 1), SIZE),
    "HEADERS without their priority": (
        frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, bytes(4)),
        SIZE,
    ),
    "broken header block": (frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff"), COMPRESSION),
    "index into nothing": (frame(HEADERS, END_HEADERS, 1, b"\xff\x80\x01"), COMPRESSION),
    "header table over our size": (frame(HEADERS, END_HEADERS, 1, b"\x3f\xe2\x1f"), COMPRESSION),
    "PRIORITY on stream 0": (frame(PRIORITY, 0, 0, bytes(5)), PROTOCOL),
    "PRIORITY of 4 bytes": (frame(PRIORITY, 0, 1, bytes(4)), SIZE),
    "RST_STREAM on stream 0": (rst(0), PROTOCOL),
    "RST_STREAM on an idle stream": (rst(5), PROTOCOL),
    "RST_STREAM of 3 bytes": (frame(RST_STREAM, 0, 1, bytes(3)), SIZE),
    "SETTINGS on a stream": (frame(SETTINGS, 0, 1), PROTOCOL),
    "SETTINGS of 5 bytes": (frame(SETTINGS, 0, 0, bytes(5)), SIZE),
    "acknowledged SETTINGS with content": (frame(SETTINGS, ACK, 0, setting(4, 1)), SIZE),
    "initial window over 2^31-1": (settings_frame((4, 1 << 31)), FLOW),
    "maximal frame under 16384": (settings_frame((5, 16383)), PROTOCOL),
    "maximal frame over 2^24-1": (settings_frame((5, 1 << 24)), PROTOCOL),
    "push neither on nor off": (settings_frame((2, 2)), PROTOCOL),
    "SETTINGS with too many": (frame(SETTINGS, 0, 0, setting(0x99, 0) * 65), CALM),
    "PUSH_PROMISE": (frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2\x82"), PROTOCOL),
    "PING on a stream": (frame(PING, 0, 1, bytes(8)), PROTOCOL),
    "PING of 7 bytes": (frame(PING, 0, 0, bytes(7)), SIZE),
    "GOAWAY on a stream": (frame(7, 0, 1, bytes(8)), PROTOCOL),
    "GOAWAY of 7 bytes": (frame(7, 0, 0, bytes(7)), SIZE),
    "GOAWAY with a novel": (frame(7, 0, 0, bytes(20_000)), CALM),
    "WINDOW_UPDATE of 3 bytes": (frame(WINDOW_UPDATE, 0, 1, bytes(3)), SIZE),
    "WINDOW_UPDATE by 0 on the connection": (window_update(0, 0), PROTOCOL),
    "connection window over 2^31-1": (window_update(0, (1 << 31) - 65535), FLOW),
    "WINDOW_UPDATE on an idle stream": (window_update(5, 1), PROTOCOL),
    "CONTINUATION without HEADERS": (continuation(1, b"\x88", end=True), PROTOCOL),
    "CONTINUATION on stream 0": (continuation(0, b"\x88", end=True), PROTOCOL),
}


@pytest.mark.parametrize("name", FATAL)
@pytest.mark.parametrize("make", [client, server])
def test_costs_the_connection(make: Callable[[], Peer], name: str) -> None:
    """The peer gets a GOAWAY with the right code, and every stream is reset with it."""
    raw, code = FATAL[name]
    peer = make()
    _, sink = peer.opened() if make is client else peer.accepted()
    assert peer.refuses(raw)[0] == code
    assert sink.events[-1] == ("reset", code)
    assert not peer.connection.can_open()


def _byte_by_byte(peer: Peer, raw: bytes) -> None:
    for byte in raw:
        give(peer.connection, bytes((byte,)))


@pytest.mark.parametrize("name", FATAL)
def test_costs_the_connection_byte_by_byte(name: str) -> None:
    """The same, when every byte comes alone."""
    raw, code = FATAL[name]
    peer = server()
    _, sink = peer.accepted()
    with pytest.raises(RemoteProtocolError) as caught:
        _byte_by_byte(peer, raw)
    assert caught.value.code == code
    assert sink.events[-1] == ("reset", code)


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6, 7, 8])
def test_judged_by_the_header(kind: int) -> None:
    """A control frame that cannot be right is refused before its payload is waited for."""
    peer = server()
    header = struct.pack(">HBBBL", 0x0FFF, 0xFF, kind, 0, 0 if kind in (4, 6, 7) else 1)
    assert peer.refuses(header)[0] in (SIZE, CALM)


def test_wrong_preface() -> None:
    """A client that speaks something else is refused at the first wrong byte."""
    peer = Connection(Role.SERVER, Owner(), OutputPool())
    peer.start()
    give(peer, PREFACE[:5])
    with pytest.raises(RemoteProtocolError):
        give(peer, b"GET / HTTP/1.1\r\n")
    assert peer.closed


@pytest.mark.parametrize(
    "raw",
    [
        frame(PING, 0, 0, bytes(8)),
        window_update(0, 1),
        frame(SETTINGS, ACK, 0),
        frame(0x55, 0, 0),
        frame(HEADERS, END_HEADERS, 1, b"\x88"),
        data(1, b"x"),
    ],
)
@pytest.mark.parametrize("role", Role)
def test_first_frame_must_be_settings(role: Role, raw: bytes) -> None:
    """The preface ends with SETTINGS; anything before them is an error (section 3.4)."""
    connection = Connection(role, Owner(), OutputPool())
    connection.start()
    if role is Role.SERVER:
        give(connection, PREFACE)
    with pytest.raises(RemoteProtocolError) as caught:
        give(connection, raw)
    assert caught.value.code == PROTOCOL


@pytest.mark.parametrize(
    "between",
    [
        data(1, b"x"),
        window_update(0, 1),
        window_update(1, 1),
        frame(PING, 0, 0, bytes(8)),
        frame(0x55, 0, 3),
        continuation(1, b"\x88", end=True),
        frame(HEADERS, END_HEADERS, 3, b"\x88"),
        rst(3),
    ],
)
def test_nothing_comes_between_the_parts_of_a_block(between: bytes) -> None:
    """Between HEADERS and its last CONTINUATION no other frame may come (section 6.10)."""
    peer = server()
    peer.accepted()
    block = peer.block([(":method", "CONNECT"), (":authority", "10.0.0.2:8080")])
    peer.give(frame(HEADERS, 0, 3, block[:2]) + continuation(3, block[2:3]))
    assert peer.refuses(between)[0] == PROTOCOL


def test_stream_ids_must_rise() -> None:
    """An id below an earlier one is never opened (section 5.1.1)."""
    peer = server()
    peer.accepted(7)
    code, text = peer.refuses(peer.connect(5))
    assert (code, text) == (PROTOCOL, "stream 5 opened below another")


@pytest.mark.parametrize("raw", [b"x", b""])
def test_data_after_the_end(raw: bytes) -> None:
    """DATA after END_STREAM costs the stream while our side is open, then the connection."""
    peer = server()
    _, sink = peer.accepted()
    peer.give(data(1, b"bye", end=True))
    assert peer.give(data(1, raw, end=True)) == [(3, 0, 1, b"\0\0\0\5")]
    assert sink.events == ["ended", ("reset", CLOSED)]
    stream, sink = peer.accepted(3)
    peer.connection.end(stream)
    peer.give(data(3, b"bye", end=True))
    assert peer.refuses(data(3, raw, end=True))[0] == CLOSED


def test_headers_after_the_end() -> None:
    """HEADERS after END_STREAM likewise."""
    peer = server()
    _, sink = peer.accepted()
    peer.give(data(1, end=True))
    assert peer.give(peer.headers(1, [("a", "b")], end=True)) == [(3, 0, 1, b"\0\0\0\5")]
    assert sink.events == ["ended", ("reset", CLOSED)]
    stream, sink = peer.accepted(3)
    peer.connection.end(stream)
    peer.give(data(3, end=True))
    assert peer.refuses(peer.connect(3))[0] == CLOSED


def test_data_after_the_peers_reset() -> None:
    """A peer that has reset a stream sends nothing more on it."""
    peer = server()
    peer.accepted()
    peer.give(rst(1))
    assert peer.refuses(data(1, b"x"))[0] == CLOSED


def test_data_before_the_answer() -> None:
    """A server that sends DATA before its answer loses the stream (RFC 9113 section 8.1)."""
    peer = client()
    sink = Sink()
    peer.connection.open(REQUEST, sink)
    peer.frames()
    assert peer.give(data(1, b"x")) == [(3, 0, 1, b"\0\0\0\1")]
    assert sink.events == [("reset", PROTOCOL)]


def test_window_update_by_0_on_a_stream() -> None:
    """An increment of 0 costs the stream (section 6.9)."""
    peer = server()
    _, sink = peer.accepted()
    assert peer.give(window_update(1, 0)) == [(3, 0, 1, b"\0\0\0\1")]
    assert sink.events == [("reset", PROTOCOL)]


def test_stream_window_over_the_limit() -> None:
    """A send window over 2^31-1 costs the stream (section 6.9.1)."""
    peer = server()
    stream, sink = peer.accepted()
    assert peer.give(window_update(1, (1 << 31) - 1 - 65535)) == []
    assert stream.send_window == (1 << 31) - 1
    assert peer.give(window_update(1, 1)) == [(3, 0, 1, b"\0\0\0\3")]
    assert sink.events == [("reset", FLOW)]


def test_frames_of_a_stream_that_we_reset() -> None:
    """What was under way when we reset a stream is swallowed, whatever it is."""
    peer = server()
    stream, sink = peer.accepted()
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.frames()
    late = data(1, b"x") + padded_data(1, b"x", 9) + window_update(1, 0) + window_update(1, 9)
    late += data(1, end=True) + peer.headers(1, [("a", "b")], end=True) + rst(1)
    assert peer.give(late) == []
    assert sink.events == []
    assert bytes(sink.received) == b""


@pytest.mark.parametrize("late", [data(1, b"x"), frame(HEADERS, END_HEADERS, 1, b"\x88")])
def test_frames_of_a_stream_that_both_have_reset(late: bytes) -> None:
    """Nothing is under way behind the peer's own reset (section 5.1)."""
    peer = server()
    stream, _ = peer.accepted()
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.give(data(1, b"under way") + rst(1))
    assert peer.refuses(late)[0] == ErrorCode.STREAM_CLOSED


def test_padding_of_a_stream_that_we_reset() -> None:
    """Padding as long as its frame is a mistake wherever it stands (section 6.1)."""
    peer = server()
    stream, _ = peer.accepted()
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.frames()
    whole = padded_data(1, b"swallowed", 200)
    for cut_at in range(1, len(whole)):
        assert peer.give(whole[:cut_at]) == peer.give(whole[cut_at:]) == []
    assert peer.refuses(frame(0, PADDED, 1, b"\x04abc"))[0] == PROTOCOL


def test_harmless_frames_are_ignored() -> None:
    """Unknown types, PRIORITY, reserved bits and late frames of a client's old streams."""
    peer = client()
    stream, sink = peer.opened()
    raw = frame(0x55, 0xFF, 1, bytes(100_000)) + frame(0xFA, 0, 0, b"GREASE")
    raw += frame(PRIORITY, 0, 99, bytes(5))
    raw += frame(0, 0, 1 | 1 << 31, b"reserved bit")
    raw += frame(WINDOW_UPDATE, 0, 1, struct.pack(">L", 1 << 31 | 5))
    window = stream.send_window
    assert peer.give(raw) == []
    assert sink.received == b"reserved bit"
    assert stream.send_window == window + 5


def test_unknown_settings_are_ignored() -> None:
    """Settings we do not know are acknowledged, and not remembered."""
    peer = server()
    assert peer.give(settings_frame((0x0A0A, 7), (9, 1), (4, 1000))) == [(4, ACK, 0, b"")]
    stream, _ = peer.accepted()
    assert stream.send_window == 1000


def test_bytes_after_the_end_of_the_connection() -> None:
    """Frames behind a fatal one, in the same bytes, are not looked at."""
    peer = client()
    _, sink = peer.opened()
    peer.refuses(data(1, b"before") + frame(PING, 0, 0, b"") + data(1, b"behind"))
    assert sink.received == b"before"


def test_goaway_names_the_last_stream_and_says_why() -> None:
    """The GOAWAY of an error tells the other side's operator what was wrong."""
    peer = server()
    peer.accepted(9)
    with pytest.raises(RemoteProtocolError, match=r"PING frame on stream 3 \(PROTOCOL_ERROR\)"):
        give(peer.connection, frame(PING, 0, 3, bytes(8)))
    (last,) = peer.frames()
    assert last == (7, 0, 0, struct.pack(">LL", 9, 1) + b"PING frame on stream 3")


def test_a_sink_may_end_the_connection_from_inside() -> None:
    """`connection_lost` in the middle of a batch stops the batch."""
    peer = client()
    stream, sink = peer.opened()

    class Closing(Sink):
        def data(self, view: memoryview) -> None:
            super().data(view)
            peer.connection.connection_lost(ErrorCode.CANCEL)

    closing = stream.sink = Closing()
    peer.give(data(1, b"one") + data(1, b"two", end=True) + goaway(0))
    assert closing.received == b"one"
    assert closing.events == [("reset", ErrorCode.CANCEL)]
    assert peer.owner.events == ["settled"]
    assert sink.events == [("answered", 200, ())]
    assert take(peer.connection) == b""


def test_a_sink_may_reset_its_stream_from_inside() -> None:
    """A stream reset from within `data` hears nothing more, and its rest is credited."""
    peer = client()
    stream, _ = peer.opened()

    class Resetting(Sink):
        def data(self, view: memoryview) -> None:
            super().data(view)
            peer.connection.reset(stream, ErrorCode.CANCEL)

    sink = stream.sink = Resetting(hold=True)
    whole = data(1, b"onetwo", end=True)
    peer.give(whole[:12])
    peer.give(whole[12:] + data(1, b"three"))
    assert sink.received == b"one"
    assert sink.events == []
    assert peer.connection._consumed == 11


def test_answers_go_on_after_an_idle_headers_frame() -> None:
    """HEADERS for a stream that a client never opened are an error, not an answer."""
    peer = client()
    assert peer.refuses(peer.headers(1, OK))[0] == PROTOCOL
    assert client().refuses(frame(HEADERS, END_HEADERS | END_STREAM, 3, b"\x88"))[0] == PROTOCOL


def test_a_goaway_tells_no_address_of_our_memory() -> None:
    """What hpack says of an endless integer ends in the repr of a view; a peer must not see it."""
    block = b"\xff" * 20
    code, text = server().refuses(frame(HEADERS, END_HEADERS, 1, block))
    assert code == ErrorCode.COMPRESSION_ERROR
    assert "0x" not in text
