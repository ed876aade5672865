"""A peer that asks for work and gives nothing loses the connection, soon and cheaply."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from pyambient.hbone import ErrorCode, LocalSettings, RemoteProtocolError
from pyambient.hbone.frames import (
    ACK,
    END_HEADERS,
    HEADERS,
    PING,
    PRIORITY,
    SETTINGS,
    frame,
)
from pyambient.hbone.limits import Budget
from pyambient.hbone.output import OUTPUT_SIZE

from .helpers import (
    CONNECT,
    REQUEST,
    Clock,
    Peer,
    Sink,
    client,
    continuation,
    data,
    give,
    rst,
    send,
    server,
    setting,
    window_update,
)

CALM = ErrorCode.ENHANCE_YOUR_CALM


def _rounds(peer: Peer, step: Callable[[int], bytes], rounds: int, pause: float = 0.0) -> int:
    """Feed `step(n)` for n in 0..rounds; return how many were taken before we had enough."""
    for n in range(rounds):
        try:
            give(peer.connection, step(n))
        except RemoteProtocolError as error:
            return n if error.code == CALM else -1
        peer.frames()
        peer.clock.now += pause
    return rounds


def _reset_at_once(peer: Peer) -> Callable[[int], bytes]:
    return lambda n: peer.connect(2 * n + 1) + rst(2 * n + 1)


def test_rapid_reset() -> None:
    """Requests that are reset before their answer end the connection (CVE-2023-44487)."""
    peer = server(accept=False)
    assert _rounds(peer, _reset_at_once(peer), 2000) == 1000
    assert peer.connection.closed


def test_resets_at_a_bounded_rate_are_fine() -> None:
    """The same number over a longer time is a peer with bad luck."""
    peer = server(accept=False)
    assert _rounds(peer, _reset_at_once(peer), 3000, pause=0.01) == 3000


def test_resets_of_answered_streams_are_fine() -> None:
    """Apps that reset their connections, however many, do not end the tunnel."""
    peer = server()
    assert _rounds(peer, _reset_at_once(peer), 3000) == 3000


def test_flood_of_malformed_requests() -> None:
    """Requests that the connection itself answers 400 end it in the end."""
    peer = server()
    assert _rounds(peer, lambda n: peer.headers(2 * n + 1, [(":method", "GET")]), 2000) == 1000


def test_flood_of_refused_streams() -> None:
    """So do streams over MAX_CONCURRENT_STREAMS."""
    peer = server(settings=LocalSettings(max_streams_accepted=2))
    assert _rounds(peer, lambda n: peer.connect(2 * n + 1), 2000) == 1002


@pytest.mark.parametrize("broken", [window_update, lambda stream_id, _: data(stream_id, b"late")])
def test_flood_of_resets_that_the_peer_makes_us_send(broken: Callable[[int, int], bytes]) -> None:
    """Stream errors provoked by the peer count as its resets (CVE-2025-8671)."""
    peer = server()

    def step(n: int) -> bytes:
        end = data(2 * n + 1, end=True)
        return peer.connect(2 * n + 1) + end + broken(2 * n + 1, 0)

    assert _rounds(peer, step, 2000) == 1000


IDLE = {
    "SETTINGS": frame(SETTINGS, 0, 0, setting(4, 70_000)),
    "acknowledgements": frame(SETTINGS, ACK, 0),
    "PING": frame(PING, 0, 0, bytes(8)),
    "PING answers": frame(PING, ACK, 0, bytes(8)),
    "PRIORITY": frame(PRIORITY, 0, 7, bytes(5)),
    "unknown frames": frame(0x55, 0, 1, b"x"),
    "empty DATA": data(1),
    "empty DATA for a dead stream": data(3),
    "GOAWAY": frame(7, 0, 0, bytes(8)),
}


@pytest.mark.parametrize("name", IDLE)
def test_flood_of_frames_that_move_nothing(name: str) -> None:
    """Frames that move nothing have a budget, which refills."""
    peer = server()
    peer.accepted(1)
    stream, _ = peer.accepted(3)
    peer.connection.reset(stream, ErrorCode.CANCEL)
    for _ in range(10):
        peer.clock.now += 1.0
        assert _rounds(peer, lambda _: IDLE[name], 100) == 100
    assert 900 <= _rounds(peer, lambda _: IDLE[name], 2000) <= 1000


def test_flood_of_informational_answers() -> None:
    """A server cannot keep a client busy with 1xx for ever."""
    peer = client()
    peer.connection.open(REQUEST, Sink())
    peer.frames()
    assert 900 <= _rounds(peer, lambda _: peer.headers(1, [(":status", "102")]), 2000) <= 1000


def test_small_data_is_no_flood() -> None:
    """Any number of frames with a byte in them is a talkative app."""
    peer = server()
    _, sink = peer.accepted()
    assert _rounds(peer, lambda _: data(1, b"x"), 5000) == 5000
    assert len(sink.received) == 5000


@pytest.mark.parametrize("fragment", [b"", b"\0", b"x" * 4000])
def test_continuation_flood(fragment: bytes) -> None:
    """A header block that does not end is cut off, empty fragments included (CVE-2024-27316)."""
    peer = server()
    peer.give(frame(HEADERS, 0, 1, b""))
    assert _rounds(peer, lambda _: continuation(1, fragment), 100) <= 32
    assert peer.connection.closed


def test_header_block_over_the_limit() -> None:
    """A single HEADERS frame over 64 KiB is refused by its header."""
    peer = server()
    assert peer.refuses(struct.pack(">HBBBL", 0x101, 0, HEADERS, END_HEADERS, 1))[0] == CALM


def test_header_list_over_the_limit() -> None:
    """A block that inflates over 64 KiB is refused (CVE-2016-6581)."""
    peer = server()
    big = ("baggage", "x" * 3900)
    peer.give(peer.headers(1, [*CONNECT, big]))
    bomb = peer.headers(3, [*CONNECT, *[big] * 20])
    assert len(bomb) < 100
    assert peer.refuses(bomb)[0] == CALM


def test_header_list_at_the_limit() -> None:
    """Just under the limit all is well."""
    peer = server()
    peer.give(peer.headers(1, [*CONNECT, *[("baggage", "x" * 3900)] * 16]))
    assert peer.owner.requests[0].baggage is not None
    assert len(peer.owner.requests[0].baggage) == 3901 * 16 - 1


def test_a_peer_that_does_not_read() -> None:
    """What a peer makes us answer, and does not take, is bounded."""
    peer = server(accept=False)
    taken = 0
    while not peer.connection.closed:
        peer.clock.now += 1.0
        raw = peer.headers(2 * taken + 1, [(":method", "GET")], end=True)
        taken += _rounds_unread(peer, raw + frame(PING, 0, 0, bytes(8)))
    assert OUTPUT_SIZE - 100 < len(peer.connection.pending) <= OUTPUT_SIZE
    # Each round makes an answer of 10 bytes and one of 17.
    assert taken * 27 < OUTPUT_SIZE + (65 << 10)


def _rounds_unread(peer: Peer, raw: bytes) -> int:
    try:
        give(peer.connection, raw)
    except RemoteProtocolError as error:
        return 0 if error.code == CALM else 1 << 30
    return 1


def test_a_blocked_output_leaves_room_for_answers() -> None:
    """While DATA fills the output, a normal number of control frames still fits."""
    peer = client(peer_settings=setting(4, 1 << 30) + setting(5, 1 << 20))
    stream, sink = peer.opened()
    peer.give(window_update(0, 1 << 30))
    assert send(peer.connection, stream, bytes(1 << 20)) < OUTPUT_SIZE
    for _ in range(500):
        give(peer.connection, frame(PING, 0, 0, bytes(8)))
    assert not peer.connection.closed
    frames = peer.frames()
    assert [kind for kind, *_ in frames[-500:]] == [PING] * 500
    assert sink.events[-1] == "writable"


def test_budget() -> None:
    """A budget gives its burst at once and then its rate."""
    clock = Clock()
    budget = Budget("things", 3, 2.0, clock)
    for _ in range(3):
        budget.spend()
    with pytest.raises(RemoteProtocolError, match="too many things"):
        budget.spend()
    clock.now = 0.4
    with pytest.raises(RemoteProtocolError):
        budget.spend()
    clock.now = 0.5
    budget.spend()
    clock.now = 1000.0
    for _ in range(3):
        budget.spend()
    assert repr(budget) == "<Budget for 0 things>"
