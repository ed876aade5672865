"""GOAWAY in both directions, limits on concurrent streams, and draining."""

from __future__ import annotations

import struct

import pytest

from pyambient.hbone import Connection, ErrorCode, LocalProtocolError, OutputPool, Role
from pyambient.hbone.frames import ACK, GOAWAY, PING, RST_STREAM, frame

from .helpers import (
    REQUEST,
    Owner,
    Pair,
    Sink,
    client,
    data,
    give,
    goaway,
    rst,
    server,
    setting,
    settings_frame,
    take,
)

LAST = (1 << 31) - 1


def test_client_opens_nothing_before_the_peers_settings() -> None:
    """Only the peer's SETTINGS tell how many streams it takes."""
    owner = Owner()
    connection = Connection(Role.CLIENT, owner, OutputPool())
    connection.start()
    assert not connection.can_open()
    with pytest.raises(LocalProtocolError):
        connection.open(REQUEST, Sink())
    give(connection, settings_frame((3, 5)))
    assert owner.events == ["settled"]
    assert connection.can_open()


@pytest.mark.parametrize(("theirs", "allowed"), [(1, 1), (99, 99), (200, 100), (None, 100)])
def test_open_streams_are_bounded(theirs: int | None, allowed: int) -> None:
    """We open as many as the peer takes, and never more than 100."""
    peer = client(peer_settings=b"" if theirs is None else setting(3, theirs))
    streams = []
    while peer.connection.can_open():
        streams.append(peer.connection.open(REQUEST, Sink()))
    assert len(streams) == peer.connection.open_count == allowed
    with pytest.raises(LocalProtocolError):
        peer.connection.open(REQUEST, Sink())
    peer.connection.reset(streams[0], ErrorCode.CANCEL)
    assert peer.connection.can_open()


def test_peer_may_lower_its_limit() -> None:
    """MAX_CONCURRENT_STREAMS may shrink under the number of streams there are."""
    peer = client()
    first, _ = peer.opened()
    peer.opened()
    peer.give(settings_frame((3, 1)))
    assert not peer.connection.can_open()
    peer.connection.reset(first, ErrorCode.CANCEL)
    assert not peer.connection.can_open()
    peer.give(settings_frame((3, 2)))
    assert peer.connection.can_open()


def test_accepted_streams_are_bounded() -> None:
    """The stream over the 200th is refused, safe to retry, and the others go on."""
    peer = server(accept=False)
    for n in range(200):
        assert peer.give(peer.connect(2 * n + 1)) == []
    assert peer.give(peer.connect(401)) == [(3, 0, 401, b"\0\0\0\7")]
    assert peer.connection.open_count == len(peer.owner.requests) == 200
    assert peer.give(rst(1) + data(401, b"late") + peer.connect(403)) == []
    assert peer.connection.open_count == 200


def test_stream_ids_run_out() -> None:
    """A client that has used the last id opens nothing more."""
    peer = client()
    peer.connection._highest_opened = LAST - 2
    sink = Sink()
    assert peer.connection.open(REQUEST, sink).id == LAST
    assert not peer.connection.can_open()


def test_goaway_spares_what_the_peer_serves() -> None:
    """Streams up to the last one go on; later ones are refused, safe to retry."""
    peer = client()
    served, served_sink = peer.opened()
    _, lost_sink = peer.opened()
    waiting = Sink()
    peer.connection.open(REQUEST, waiting)
    peer.frames()
    assert peer.give(goaway(1)) == []
    assert lost_sink.events[1:] == [("reset", ErrorCode.REFUSED_STREAM)]
    assert waiting.events == [("reset", ErrorCode.REFUSED_STREAM)]
    assert served_sink.events == [("answered", 200, ())]
    assert peer.owner.events == ["settled", ("goaway", 0)]
    assert not peer.connection.can_open()
    peer.give(data(1, b"goes on"))
    assert served_sink.received == b"goes on"
    assert peer.give(frame(PING, 0, 0, b"8 bytes.")) == [(PING, ACK, 0, b"8 bytes.")]
    peer.connection.end(served)
    peer.give(data(1, end=True))
    assert peer.owner.events[2:] == ["drained"]


def test_graceful_goaway_in_two_steps() -> None:
    """GOAWAY with the highest id, then with the last one, as ztunnel sends it."""
    peer = client()
    stream, sink = peer.opened()
    peer.give(goaway(LAST))
    peer.give(goaway(1))
    assert sink.events == [("answered", 200, ())]
    peer.connection.reset(stream, ErrorCode.CANCEL)
    peer.frames()
    assert peer.owner.events == ["settled", ("goaway", 0), ("goaway", 0), "drained"]


def test_goaway_with_an_error() -> None:
    """The code is passed on, also one that nobody knows."""
    peer = client()
    peer.give(goaway(0, 0x1234))
    assert peer.owner.events == ["settled", ("goaway", 0x1234), "drained"]


def test_drained_is_said_once() -> None:
    """More GOAWAYs, in either direction, do not say `drained` again."""
    peer = server()
    peer.give(goaway(0))
    peer.give(goaway(0))
    peer.connection.go_away()
    ping = peer.frames()[-1]
    peer.give(frame(PING, ACK, 0, ping[3]))
    assert peer.owner.events.count("drained") == 1


def test_goaway_of_a_client() -> None:
    """A server takes a client's GOAWAY as: drained when the last stream is gone."""
    peer = server()
    stream, sink = peer.accepted()
    peer.give(goaway(0))
    assert sink.events == []
    peer.connection.end(stream)
    peer.give(data(1, end=True))
    assert peer.owner.events == ["settled", ("goaway", 0), "drained"]


def test_server_drains_in_two_steps() -> None:
    """A server loses no stream that was under way when it said GOAWAY."""
    peer = server()
    first, _ = peer.accepted(1)
    peer.connection.go_away()
    peer.connection.go_away()
    announced, ping = peer.frames()
    assert announced == (GOAWAY, 0, 0, struct.pack(">LL", LAST, 0))
    assert ping[0] == PING
    second, _ = peer.accepted(3)
    assert peer.give(frame(PING, ACK, 0, b"another.")) == []
    assert peer.give(frame(PING, ACK, 0, ping[3])) == [(GOAWAY, 0, 0, struct.pack(">LL", 3, 0))]
    assert peer.give(frame(PING, ACK, 0, ping[3])) == []
    refused = peer.give(peer.connect(5) + data(5, b"late"))
    assert refused == [(RST_STREAM, 0, 5, b"\0\0\0\7")]
    assert len(peer.owner.requests) == 2
    peer.connection.reset(first, ErrorCode.CANCEL)
    peer.frames()
    assert peer.owner.events == ["settled"]
    peer.connection.end(second)
    peer.give(data(3, end=True))
    assert peer.owner.events == ["settled", "drained"]


def test_drained_comes_after_the_last_reset() -> None:
    """The sink of the last stream hears of its end before the owner hears `drained`."""
    peer = server()
    stream, _ = peer.accepted()

    class Telling(Sink):
        def reset(self, code: int) -> None:
            peer.owner.events.append(("reset", code))

    stream.sink = Telling()
    peer.give(goaway(0) + rst(1))
    assert peer.owner.events == ["settled", ("goaway", 0), ("reset", 8), "drained"]


def test_drained_comes_after_the_last_byte() -> None:
    """An owner that closes in `drained` does not cut off what was still to be sent."""
    peer = server()
    stream, _ = peer.accepted()
    peer.give(goaway(0))
    give(peer.connection, data(1, end=True))
    peer.connection.end(stream)
    assert "drained" not in peer.owner.events
    assert peer.frames() == [(0, 1, 1, b"")]
    assert peer.owner.events[-1] == "drained"


def test_client_drains_at_once() -> None:
    """A client says GOAWAY once and is drained when its streams are gone."""
    pair = Pair()
    ours, sink, theirs, _ = pair.tunnel()
    pair.client.go_away()
    pair.run()
    assert not pair.client.can_open()
    assert pair.server_owner.events == ["settled", ("goaway", 0)]
    pair.client.end(ours)
    pair.server.end(theirs)
    pair.run()
    assert sink.events[-1] == "ended"
    assert pair.client_owner.events == ["settled", "drained"]
    assert pair.server_owner.events == ["settled", ("goaway", 0), "drained"]


def test_idle_client_is_drained_once_its_goaway_is_out() -> None:
    """Without streams, only the GOAWAY itself is waited for."""
    pair = Pair()
    pair.client.go_away()
    assert pair.client_owner.events == ["settled"]
    take(pair.client)
    assert pair.client_owner.events == ["settled", "drained"]


def test_drain_of_both_ends_at_once() -> None:
    """Both may drain at the same time; both hear `drained` once."""
    pair = Pair()
    ours, _, theirs, _ = pair.tunnel()
    pair.client.go_away()
    pair.server.go_away()
    pair.run()
    pair.client.reset(ours, ErrorCode.CANCEL)
    pair.run()
    assert theirs.closed
    assert pair.client_owner.events.count("drained") == 1
    assert pair.server_owner.events.count("drained") == 1


def test_pings_of_the_owner_are_counted() -> None:
    """Unanswered PINGs count up, an answer is for all before it; draining does not count."""
    peer = server()
    for payload in (b"the 1st.", b"the 2nd.", b"the 3rd."):
        peer.connection.ping(payload)
    peer.connection.go_away()
    assert peer.connection.pings_unanswered == 3
    peer.frames()
    peer.give(frame(PING, ACK, 0, b"the 2nd."))
    assert peer.connection.pings_unanswered == 1
    peer.give(frame(PING, ACK, 0, b"the 3rd."))
    assert peer.connection.pings_unanswered == 0


def test_an_answer_to_no_ping_of_ours_does_not_count() -> None:
    """A peer that reads nothing could send answers all the same, and be kept for ever."""
    peer = server()
    peer.connection.ping(b"unguess.")
    peer.give(frame(PING, ACK, 0, b"pyambien"))
    assert peer.connection.pings_unanswered == 1
