"""Properties: any cut of the bytes is the same, and garbage is a RemoteProtocolError at worst."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyambient.hbone import Connection, LocalSettings, OutputPool, RemoteProtocolError, Role
from pyambient.hbone.frames import END_HEADERS, END_STREAM, HEADERS, PING, PREFACE, frame

from .helpers import (
    REQUEST,
    Owner,
    Peer,
    Sink,
    client,
    continuation,
    cut,
    data,
    give,
    goaway,
    padded_data,
    rst,
    server,
    settings_frame,
    take,
    window_update,
)

WINDOWS = LocalSettings(stream_window=20_000, connection_window=70_000)


def _client_session(peer: Peer) -> bytes:
    """What a server might send to a client with three streams: a bit of everything."""
    informational = peer.headers(1, [(":status", "103")])
    block = peer.block([(":status", "200"), ("baggage", "service.name=app")])
    return b"".join(
        (
            informational,
            frame(HEADERS, 0, 1, block[:3]) + continuation(1, block[3:], end=True),
            data(1, bytes(range(256)) * 3),
            frame(PING, 0, 0, b"12345678"),
            padded_data(1, b"padded", 7) + padded_data(1, b"", 3) + padded_data(1, b"", 0),
            peer.headers(3, [(":status", "503")], end=True) + rst(3, 0),
            peer.headers(5, [(":status", "200"), ("baggage", "service.name=app")]),
            settings_frame((4, 1000), (5, 20_000)) + frame(0x77, 3, 9, b"unknown"),
            window_update(1, 77) + window_update(0, 78) + data(5, b"x") + data(5),
            data(1, b"bye", end=True) + peer.headers(5, [("checksum", "0")], end=True),
            goaway(5),
        )
    )


def _told(pieces: list[bytes]) -> list[Any]:
    """What a client's sinks and owner hear of a session that comes in these pieces."""
    peer = client(settings=WINDOWS)
    sinks = [Sink() for _ in range(3)]
    for sink in sinks:
        sink.stream = peer.connection.open(REQUEST, sink)
    peer.frames()
    out = bytearray()
    for piece in pieces:
        give(peer.connection, piece)
        out += take(peer.connection)
    told = [(bytes(sink.received), sink.events) for sink in sinks]
    windows = [s.send_window for s in peer.connection.streams.values()]
    return [told, windows, peer.owner.events, [f for f in cut(bytes(out)) if f[0] != 8]]


def _split(raw: bytes, at: list[int]) -> list[bytes]:
    marks = [0, *sorted(at), len(raw)]
    return [raw[a:b] for a, b in itertools.pairwise(marks)]


SESSION = _client_session(client())
WHOLE = _told([SESSION])


def test_the_session_is_worth_cutting() -> None:
    """A guard for the property below: the session says what it should."""
    told, windows, owner, out = WHOLE
    assert told[0][0] == bytes(range(256)) * 3 + b"padded" + b"bye"
    assert told[1][1] == [("answered", 503, ()), "ended", ("reset", 0)]
    assert told[2][1][-1] == "ended"
    assert windows == [1077, 1000]
    assert owner == ["settled", ("goaway", 0)]
    assert [kind for kind, *_ in out] == [PING, 4]


@given(st.lists(st.integers(0, len(SESSION)), max_size=60))
@example(list(range(len(SESSION))))
@settings(max_examples=300, deadline=None)
def test_any_cut_is_the_same(at: list[int]) -> None:
    """However the transport cuts the bytes, sinks and owner hear the same."""
    assert _told(_split(SESSION, at)) == WHOLE


@given(st.integers(1, 40), st.lists(st.integers(0, 1 << 16), max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_cut_of_a_preface(first: int, at: list[int]) -> None:
    """A server takes preface, SETTINGS and request in any cut."""
    request = server().connect(1)
    raw = PREFACE + settings_frame((4, 500)) + request + data(1, b"hello", end=True)
    owner = Owner()
    connection = Connection(Role.SERVER, owner, OutputPool())
    connection.start()
    for piece in _split(raw, [first % len(raw), *(n % len(raw) for n in at)]):
        give(connection, piece)
    assert owner.requests == [REQUEST]
    assert owner.sinks[1].received == b"hello"
    assert owner.sinks[1].events == ["ended"]


KINDS = st.one_of(st.integers(0, 9), st.integers(0, 255))
STREAM_IDS = st.one_of(st.integers(0, 9), st.integers(0, (1 << 32) - 1))
HEADERISH = st.one_of(
    st.binary(max_size=40),
    st.just(b"\x02\x07CONNECT\x01\x03a:1"),
    st.just(b"\x88"),
    st.lists(st.sampled_from([b"\x88", b"\x8c", b"\x40\x01a\x01b", b"\xbe", b"\x20"])).map(
        b"".join
    ),
)
PAYLOADS = st.one_of(
    HEADERISH,
    st.integers(0, (1 << 32) - 1).map(lambda n: n.to_bytes(4, "big")),
    st.binary(min_size=8, max_size=8),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, (1 << 32) - 1)), max_size=3).map(
        lambda pairs: settings_frame(*pairs)[9:]
    ),
)
FLAGS = st.one_of(st.just(END_HEADERS), st.just(END_HEADERS | END_STREAM), st.integers(0, 255))
FRAMES = st.builds(frame, KINDS, FLAGS, STREAM_IDS, PAYLOADS)
GARBAGE = st.lists(st.one_of(FRAMES, FRAMES, FRAMES, st.binary(max_size=30)), max_size=30)


def _take_garbage(peer: Peer, pieces: list[bytes]) -> None:
    """Feed pieces; nothing but RemoteProtocolError may come of it, and then all is over."""
    for piece in pieces:
        try:
            give(peer.connection, piece)
        except RemoteProtocolError:
            assert peer.connection.closed
            assert not peer.connection.streams
        for kind, _, stream_id, payload in cut(take(peer.connection)):
            assert kind in (0, 1, 3, 4, 6, 7, 8)
            assert stream_id >= 0
            assert len(payload) <= 16384


@given(pieces=GARBAGE, accept=st.booleans())
@settings(max_examples=500, deadline=None)
def test_garbage_to_a_server(*, pieces: list[bytes], accept: bool) -> None:
    """Frames of any kind, sane or not, never raise anything else and never loop."""
    peer = server(accept=accept)
    peer.accepted() if accept else peer.give(peer.connect())
    _take_garbage(peer, pieces)


@given(GARBAGE)
@settings(max_examples=500, deadline=None)
def test_garbage_to_a_client(pieces: list[bytes]) -> None:
    """Likewise what a server might send."""
    peer = client()
    _, sink = peer.opened()
    peer.connection.open(REQUEST, Sink())
    _take_garbage(peer, pieces)
    resets = [event for event in sink.events if event[0] == "reset"]
    assert len(resets) == (1 if peer.connection.closed or resets else 0)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_instead_of_a_preface(raw: bytes) -> None:
    """A server that is sent anything at all as the first bytes."""
    for start in (raw, PREFACE + raw):
        connection = Connection(Role.SERVER, Owner(), OutputPool())
        connection.start()
        try:
            give(connection, start)
        except RemoteProtocolError:
            assert connection.closed
