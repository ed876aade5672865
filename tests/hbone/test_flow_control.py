"""Windows: ours, the peer's, and that nothing is ever lost between them."""

from __future__ import annotations

import struct

import pytest

from pyambient.hbone import Connection, ErrorCode, LocalSettings
from pyambient.hbone.frames import DATA, END_STREAM

from .helpers import (
    REQUEST,
    Pair,
    Peer,
    Sink,
    client,
    data,
    padded_data,
    rst,
    send,
    server,
    setting,
    settings_frame,
    take,
    window_update,
)

SMALL = LocalSettings(stream_window=1000, connection_window=100_000)
NARROW = LocalSettings(stream_window=100_000, connection_window=70_000)


FAR = LocalSettings()
NEAR = FAR.at_distance(0.0001)


def _credited(connection: Connection) -> int:
    """Bytes the peer may send, plus those that wait for the next WINDOW_UPDATE."""
    return connection._receive_window + connection._consumed


def test_stream_window_overrun() -> None:
    """A peer that overruns a stream's window loses the stream; the bytes are credited."""
    peer = server(settings=SMALL, hold=True)
    stream, sink = peer.accepted()
    assert peer.give(data(1, bytes(1000))) == []
    assert peer.give(data(1, b"x")) == [(3, 0, 1, b"\0\0\0\3")]
    assert sink.events == [("reset", ErrorCode.FLOW_CONTROL_ERROR)]
    assert len(sink.received) == 1000
    assert _credited(peer.connection) == 100_000
    assert stream.closed


def test_connection_window_overrun() -> None:
    """A peer that overruns the connection's window loses the connection."""
    peer = server(settings=NARROW, hold=True)
    peer.accepted(1)
    peer.accepted(3)
    peer.give(data(1, bytes(40_000)) + data(3, bytes(30_000)))
    assert peer.refuses(data(3, b"x"))[0] == ErrorCode.FLOW_CONTROL_ERROR


@pytest.mark.parametrize(
    ("settings", "round_trip", "window"),
    [
        (FAR, 0.05, 1 << 20),
        (FAR, 0.001, 1 << 20),
        (FAR, 0.0009, 448 << 10),
        (LocalSettings(shared_stream_window=10_000), 0.0001, 10_000),
        (LocalSettings(stream_window=10_000), 0.0001, 10_000),
        (LocalSettings(stream_window=600 << 10), 0.05, 600 << 10),
    ],
)
def test_what_a_stream_begins_with(settings: LocalSettings, round_trip: float, window: int) -> None:
    """A near peer fills a smaller window as well as a large one; nobody gets more than is set."""
    assert settings.at_distance(round_trip).initial_window == window


def test_a_near_peers_stream_alone_gets_as_much_as_a_far_ones() -> None:
    """Nothing waits behind it."""
    assert NEAR.stream_window == FAR.stream_window


def test_window_update_at_a_quarter() -> None:
    """Credit is sent once it is a quarter of the window, for stream and connection apart."""
    peer = server(settings=LocalSettings(stream_window=1000, connection_window=80_000), hold=True)
    stream, _ = peer.accepted()
    peer.give(data(1, bytes(800)))
    peer.connection.credit(stream, 249)
    assert peer.frames() == []
    peer.connection.credit(stream, 1)
    assert peer.frames() == [(8, 0, 1, struct.pack(">L", 250))]
    assert stream.receive_window == 450
    for _ in range(30):
        peer.connection.credit(stream, stream.uncredited)
        peer.give(data(1, bytes(700)))
    updates = [payload for kind, _, stream_id, payload in peer.frames() if stream_id == 0]
    assert updates == []
    peer.connection.credit(stream, stream.uncredited)
    assert [frame[2] for frame in peer.frames()] == [1]


def test_connection_window_update() -> None:
    """The connection's window is opened like a stream's."""
    peer = server(settings=NARROW, hold=True)
    stream, _ = peer.accepted()
    peer.give(data(1, bytes(20_000)))
    peer.connection.credit(stream, 17_500)
    assert peer.frames() == [(8, 0, 0, struct.pack(">L", 17_500))]


def test_no_update_for_a_stream_that_has_ended() -> None:
    """After the peer's END_STREAM only the connection's window is of use to it."""
    peer = server(settings=NARROW, hold=True)
    stream, _ = peer.accepted()
    peer.give(data(1, bytes(30_000), end=True))
    peer.connection.credit(stream, 30_000)
    assert [(kind, stream_id) for kind, _, stream_id, _ in peer.frames()] == [(8, 0)]


def test_credit_after_both_ends() -> None:
    """A sink that is still at work when its stream has closed holds, then frees the window."""
    peer = server(settings=NARROW, hold=True)
    stream, _ = peer.accepted()
    peer.connection.end(stream)
    peer.give(data(1, bytes(30_000), end=True))
    assert stream.closed
    assert peer.connection.open_count == 0
    assert _credited(peer.connection) == 40_000
    peer.connection.credit(stream, 10_000)
    assert _credited(peer.connection) == 50_000
    peer.connection.reset(stream, ErrorCode.CANCEL)
    assert _credited(peer.connection) == 70_000
    peer.connection.credit(stream, 20_000)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    assert _credited(peer.connection) == 70_000
    assert [(kind, stream_id) for kind, _, stream_id, _ in peer.frames()] == [(8, 0)]


@pytest.mark.parametrize("ours", [True, False])
def test_a_reset_frees_what_its_sink_held(*, ours: bool) -> None:
    """Bytes in the hands of a dead stream's sink never stall the tunnel."""
    peer = server(settings=NARROW, hold=True)
    stream, sink = peer.accepted()
    peer.give(data(1, bytes(50_000)))
    if ours:
        peer.connection.reset(stream, ErrorCode.CANCEL)
        sent = peer.frames()
    else:
        sent = peer.give(rst(1))
    assert sent[-1] == (8, 0, 0, struct.pack(">L", 50_000))
    assert _credited(peer.connection) == 70_000
    peer.connection.credit(stream, len(sink.received))
    assert _credited(peer.connection) == 70_000


def test_data_of_gone_streams_never_stalls_the_tunnel() -> None:
    """Many windows' worth for a stream that we have reset leaves the tunnel open."""
    peer = server(settings=NARROW, hold=True)
    stream, _ = peer.accepted(1)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    for _ in range(20):
        peer.give(data(1, bytes(30_000)) + padded_data(1, bytes(1000), 100))
        assert peer.connection._receive_window >= 35_000
    peer.accepted(3)
    peer.give(data(3, b"alive"))
    assert peer.owner.sinks[3].received == b"alive"


def test_forgotten_streams_are_swallowed_too() -> None:
    """A stream so long gone that it is forgotten gets the same."""
    peer = client(settings=NARROW)
    for _ in range(600):
        stream = peer.connection.open(REQUEST, Sink())
        peer.connection.reset(stream, ErrorCode.CANCEL)
        peer.frames()
    peer.give(peer.headers(1, [(":status", "200")]) + data(1, bytes(50_000), end=True))
    assert _credited(peer.connection) == 70_000


def test_padding_is_credited_by_the_connection() -> None:
    """Padding and its length count for both windows, and no sink sees them."""
    peer = server(settings=SMALL, hold=True)
    stream, sink = peer.accepted()
    peer.give(padded_data(1, b"abc", 20))
    assert sink.received == b"abc"
    assert stream.uncredited == 3
    assert stream.receive_window == 1000 - 24
    assert stream.consumed == 21
    assert _credited(peer.connection) == 100_000 - 3


def test_initial_window_changes_every_stream() -> None:
    """A change of SETTINGS_INITIAL_WINDOW_SIZE moves the window of every open stream."""
    peer = client(peer_settings=setting(4, 1000))
    first, _ = peer.opened()
    send(peer.connection, first, bytes(400))
    peer.give(settings_frame((4, 1500)))
    second, _ = peer.opened()
    assert (first.send_window, second.send_window) == (1100, 1500)
    peer.give(settings_frame((4, 0)))
    assert (first.send_window, second.send_window) == (-400, 0)
    assert not len(peer.connection.reserve(first, 10))
    peer.give(window_update(1, 400))
    assert not len(peer.connection.reserve(first, 10))
    peer.give(window_update(1, 1))
    assert len(peer.connection.reserve(first, 10)) == 1


def test_end_below_a_window_of_0() -> None:
    """END_STREAM needs no window: an empty DATA frame costs nothing (RFC 9113 section 6.9)."""
    peer = client(peer_settings=setting(4, 1000))
    stream, _ = peer.opened()
    send(peer.connection, stream, bytes(1000))
    peer.give(settings_frame((4, 1)))
    assert stream.send_window == -999
    peer.connection.end(stream)
    assert peer.frames()[-1] == (DATA, END_STREAM, stream.id, b"")


def test_initial_window_that_overflows() -> None:
    """A change that takes a stream's window over 2^31-1 costs the connection."""
    peer = client()
    peer.opened()
    peer.give(window_update(1, 1000))
    code, _ = peer.refuses(settings_frame((4, (1 << 31) - 1)))
    assert code == ErrorCode.FLOW_CONTROL_ERROR


def test_reserve_is_bounded_by_everything() -> None:
    """A slot is never larger than the want, both windows and the peer's frame size."""
    peer = client(peer_settings=setting(4, 1 << 30))
    stream, _ = peer.opened()
    reserve = peer.connection.reserve
    assert len(reserve(stream, 100)) == 100
    assert len(reserve(stream, 1 << 20)) == 16384
    peer.give(settings_frame((5, 1 << 20)))
    assert len(reserve(stream, 1 << 20)) == 65535
    peer.give(window_update(0, 1 << 24))
    assert len(reserve(stream, 1 << 20)) == 256 << 10
    peer.give(settings_frame((4, 30_000)))
    assert len(reserve(stream, 1 << 20)) == 30_000
    assert len(reserve(stream, 0)) == 0


def test_nothing_to_send_into_before_the_answer() -> None:
    """Until the CONNECT is answered there is no room for bytes, on either side."""
    pair = Pair(accept=False)
    ours, _ = pair.open()
    pair.run()
    theirs = pair.server_owner.streams[0]
    assert not len(pair.client.reserve(ours, 10))
    assert not len(pair.server.reserve(theirs, 10))
    pair.server.accept(theirs)
    pair.run()
    assert len(pair.client.reserve(ours, 10)) == 10
    assert len(pair.server.reserve(theirs, 10)) == 10


@pytest.mark.parametrize("opened_by", ["stream", "connection", "settings"])
def test_writable_when_the_window_opens(opened_by: str) -> None:
    """A stream that found its window closed is told once when it opens, whatever opens it."""
    peer = client(peer_settings=setting(4, 70_000 if opened_by == "connection" else 1000))
    stream, sink = peer.opened()
    send(peer.connection, stream, bytes(70_000))
    assert not len(peer.connection.reserve(stream, 1))
    peer.frames()
    del sink.events[:]
    opens = {
        "stream": window_update(1, 5),
        "connection": window_update(0, 5),
        "settings": settings_frame((4, 1005)),
    }
    peer.give(opens[opened_by])
    assert sink.events == ["writable"]
    peer.give(window_update(0, 5) + window_update(1, 5))
    assert sink.events == ["writable"]


def test_starved_streams_take_turns() -> None:
    """When the connection's window opens, starved streams are woken in the order they starved."""
    peer = client(peer_settings=setting(4, 1 << 20))
    order: list[int] = []
    opened = [peer.opened() for _ in range(3)]
    send(peer.connection, opened[0][0], bytes(65535))
    for stream, sink in opened:

        def take_some(stream_id: int = stream.id) -> None:
            order.append(stream_id)
            send(peer.connection, peer.connection.streams[stream_id], bytes(100))

        sink.on_writable = take_some
        assert send(peer.connection, stream, bytes(100)) == 0
    peer.frames()
    for _ in range(3):
        peer.give(window_update(0, 100))
    assert order[:3] == [1, 3, 5]
    assert sorted(set(order)) == [1, 3, 5]


def test_a_dead_stream_is_not_woken() -> None:
    """A stream that ended or died while starved hears nothing of windows."""
    peer = client(peer_settings=setting(4, 0))
    ended, ended_sink = peer.opened()
    dead, dead_sink = peer.opened()
    for stream in (ended, dead):
        assert not len(peer.connection.reserve(stream, 1))
    peer.connection.end(ended)
    peer.connection.reset(dead, ErrorCode.CANCEL)
    peer.frames()
    peer.give(window_update(1, 10) + window_update(3, 10) + settings_frame((4, 100)))
    assert "writable" not in ended_sink.events + dead_sink.events


def test_one_stuck_app_does_not_stop_the_others() -> None:
    """A stream whose sink credits nothing stalls alone."""
    pair = Pair(server_settings=LocalSettings(stream_window=50_000, connection_window=200_000))
    stuck, _, _, stuck_sink = pair.tunnel()
    stuck_sink.hold = True
    other, _, _, other_sink = pair.tunnel()
    assert send(pair.client, stuck, bytes(1_000_000)) == 50_000
    sent = 0
    for _ in range(100):
        sent += send(pair.client, other, bytes(1_000_000 - sent))
        pair.run()
    assert len(other_sink.received) == 1_000_000
    assert len(stuck_sink.received) == 50_000


def test_every_byte_is_credited_once() -> None:
    """Sum credited equals sum received, over a session of everything at once."""
    peer = Peer(server().connection.role, hold=True, settings=NARROW)
    received = 0
    for n in range(1, 60, 2):
        stream, _ = peer.accepted(n)
        frames = [data(n, bytes(500)), padded_data(n, bytes(200), n), data(n, end=n % 4 == 1)]
        peer.give(b"".join(frames))
        received += 500 + 200 + 1 + n
        if n % 3 == 0:
            peer.connection.credit(stream, 300)
        if n % 5 == 0:
            peer.connection.reset(stream, ErrorCode.CANCEL)
        held = sum(s.uncredited for s in peer.connection.streams.values())
        assert _credited(peer.connection) + held == 70_000
    assert received > 20_000
    take(peer.connection)


SHARED = LocalSettings(stream_window=4000, shared_stream_window=1000, connection_window=80_000)


def test_a_stream_alone_gets_the_large_window() -> None:
    """With its first credit the only stream of a tunnel may have four times as much under way."""
    peer = server(settings=SHARED, hold=True)
    stream, _ = peer.accepted()
    peer.give(data(1, bytes(500)))
    peer.connection.credit(stream, 500)
    assert take(peer.connection) == window_update(1, 3500)
    assert stream.receive_window == 4000


def test_a_stream_that_gets_company_keeps_a_small_window() -> None:
    """What it had is not taken away, but it is not given again either."""
    peer = server(settings=SHARED, hold=True)
    stream, _ = peer.accepted()
    peer.give(data(1, bytes(500)))
    peer.connection.credit(stream, 500)
    take(peer.connection)
    peer.accepted(3)
    for _ in range(4):
        peer.give(data(1, bytes(1000)))
    peer.connection.credit(stream, 3000)
    assert take(peer.connection) == b""
    peer.connection.credit(stream, 1000)
    assert take(peer.connection) == window_update(1, 1000)
    assert stream.receive_window == 1000


def test_streams_that_stall_leave_room_for_the_others() -> None:
    """Eight apps that read nothing hold half of the connection's window, not all of it."""
    peer = server(hold=True)
    for stream_id in range(1, 16, 2):
        stream, _ = peer.accepted(stream_id)
        for _ in range(64):
            peer.give(data(stream_id, bytes(16 << 10)))
        assert stream.receive_window == 0
    assert peer.connection._receive_window == 8 << 20
