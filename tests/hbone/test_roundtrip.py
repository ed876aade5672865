"""Our client and our server, joined in memory."""

from __future__ import annotations

import os

import pytest

from pyambient.hbone import ConnectRequest, ErrorCode, LocalProtocolError

from .helpers import REQUEST, Pair, Sink, send, take


def test_request_and_answer() -> None:
    """A CONNECT arrives as it was sent, and the accepted answer with its headers."""
    pair = Pair(accept=False)
    request = ConnectRequest(
        authority="[fd00::2]:8080",
        baggage="k8s.namespace.name=default,k8s.deployment.name=app",
        forwarded='for="10.0.0.1:4711";host=app.default.svc.cluster.local',
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        forwarded_network="east",
    )
    _, sink = pair.open(request)
    pair.run()
    assert pair.server_owner.requests == [request]
    pair.server.accept(pair.server_owner.streams[0], (("baggage", "service.name=app"),))
    pair.run()
    assert sink.events == [("answered", 200, (("baggage", "service.name=app"),))]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 503])
def test_refusal(status: int) -> None:
    """A refused request ends on both sides: the answer, its end, and no stream is left."""
    pair = Pair(accept=False)
    _, sink = pair.open()
    pair.run()
    pair.server.refuse(pair.server_owner.streams[0], status)
    pair.run()
    assert sink.events[:2] == [("answered", status, ()), "ended"]
    assert pair.server.open_count == 0
    assert pair.client.open_count == 0


@pytest.mark.parametrize("size", [1, 9, 4096, 300_000, 3_000_000])
def test_bytes_both_ways(size: int) -> None:
    """Bytes arrive in order and unchanged in both directions at once, whatever the amount."""
    pair = Pair()
    ours, client_sink, theirs, server_sink = pair.tunnel()
    up, down = os.urandom(size), os.urandom(size)
    sent_up = sent_down = 0
    while sent_up < size or sent_down < size:
        before = sent_up + sent_down
        sent_up += send(pair.client, ours, up[sent_up:])
        sent_down += send(pair.server, theirs, down[sent_down:])
        assert sent_up + sent_down > before
        pair.run()
    assert server_sink.received == up
    assert client_sink.received == down


def test_half_close_of_the_client() -> None:
    """After the client's end the server may still send."""
    pair = Pair()
    ours, client_sink, theirs, server_sink = pair.tunnel()
    pair.client.end(ours)
    pair.run()
    assert server_sink.events == ["ended"]
    assert client_sink.events == [("answered", 200, ())]
    assert send(pair.server, theirs, b"still here") == 10
    pair.server.end(theirs)
    pair.run()
    assert client_sink.received == b"still here"
    assert client_sink.events[-1] == "ended"
    assert (pair.client.open_count, pair.server.open_count) == (0, 0)
    assert ours.closed
    assert theirs.closed


def test_half_close_of_the_server() -> None:
    """After the server's end the client may still send."""
    pair = Pair()
    ours, client_sink, theirs, server_sink = pair.tunnel()
    pair.server.end(theirs)
    pair.run()
    assert client_sink.events[-1] == "ended"
    assert send(pair.client, ours, b"still here") == 10
    pair.client.end(ours)
    pair.run()
    assert server_sink.received == b"still here"
    assert (pair.client.open_count, pair.server.open_count) == (0, 0)


@pytest.mark.parametrize("code", [*ErrorCode, 0x1234])
def test_reset_carries_its_code(code: int) -> None:
    """A reset arrives with its code, also NO_ERROR, CANCEL and codes nobody knows."""
    pair = Pair()
    ours, client_sink, theirs, server_sink = pair.tunnel()
    pair.client.reset(ours, code)
    pair.run()
    assert server_sink.events == [("reset", code)]
    assert client_sink.events == [("answered", 200, ())]
    assert ours.closed
    assert theirs.closed
    assert (pair.client.open_count, pair.server.open_count) == (0, 0)


def test_early_bytes_wait_for_the_sink() -> None:
    """What comes before the owner has set a sink is told to the sink, in order."""
    pair = Pair(accept=False)
    ours, _ = pair.open()
    pair.run()
    raw = b"\0\0\x05\0\0\0\0\0\x01early" + b"\0\0\x05\0\1\0\0\0\x01 bird"
    pair.server.receive(memoryview(raw))
    sink = Sink()
    stream = sink.stream = pair.server_owner.streams[0]
    stream.sink = sink
    assert sink.received == b"early bird"
    assert sink.events == ["ended"]
    pair.server.accept(stream)
    pair.run()
    pair.server.end(stream)
    assert pair.server.open_count == 0
    assert not ours.closed


def test_early_reset_waits_for_the_sink() -> None:
    """A request that was given up before a sink was set tells the sink so, and nothing else."""
    pair = Pair(accept=False)
    ours, _ = pair.open()
    pair.run()
    pair.client.reset(ours, ErrorCode.CANCEL)
    pair.run()
    sink = Sink()
    stream = pair.server_owner.streams[0]
    stream.sink = sink
    assert sink.events == [("reset", ErrorCode.CANCEL)]


def test_too_many_early_bytes() -> None:
    """A peer that floods an unanswered request that nobody has taken loses the stream."""
    pair = Pair(accept=False)
    _, sink = pair.open()
    pair.run()
    block = b"\0\x40\0\0\0\0\0\0\x01" + bytes(0x4000)
    for _ in range(5):
        pair.server.receive(memoryview(block))
    pair.run()
    assert sink.events == [("reset", ErrorCode.ENHANCE_YOUR_CALM)]
    late = Sink()
    pair.server_owner.streams[0].sink = late
    assert late.events == [("reset", ErrorCode.ENHANCE_YOUR_CALM)]


def test_closed_streams_take_every_call() -> None:
    """A stream that died under its user makes all calls about it do nothing."""
    pair = Pair()
    ours, _, theirs, _ = pair.tunnel()
    pair.client.reset(ours, ErrorCode.CANCEL)
    pair.run()
    take(pair.server)
    pair.server.accept(theirs)
    pair.server.refuse(theirs, 503)
    pair.server.end(theirs)
    pair.server.reset(theirs, ErrorCode.CANCEL)
    pair.server.credit(theirs, 17)
    assert not len(pair.server.reserve(theirs, 100))
    assert take(pair.server) == b""


def test_local_mistakes() -> None:
    """What the caller must not do raises LocalProtocolError and sends nothing."""
    pair = Pair(accept=False)
    ours, _ = pair.open()
    pair.run()
    theirs = pair.server_owner.streams[0]
    with pytest.raises(LocalProtocolError):
        pair.server.open(REQUEST, Sink())
    with pytest.raises(LocalProtocolError):
        pair.server.end(theirs)
    with pytest.raises(LocalProtocolError):
        pair.client.accept(ours)
    with pytest.raises(LocalProtocolError):
        pair.server.credit(theirs, 1)
    pair.server.accept(theirs)
    with pytest.raises(LocalProtocolError):
        pair.server.refuse(theirs, 503)
    pair.run()
    pair.client.end(ours)
    with pytest.raises(LocalProtocolError):
        pair.client.end(ours)
    pair.run()
    assert not theirs.closed


def test_connection_lost_resets_every_sink_once() -> None:
    """When the transport goes, every stream hears it once and the output goes back."""
    pair = Pair()
    _, first, *_ = pair.tunnel()
    _, second, *_ = pair.tunnel()
    pair.client.ping(b"12345678")
    assert pair.pool.taken == 1
    pair.client.connection_lost(ErrorCode.INTERNAL_ERROR)
    pair.client.eof()
    for sink in (first, second):
        assert sink.events[1:] == [("reset", ErrorCode.INTERNAL_ERROR)]
    assert pair.pool.taken == 0
    assert not len(pair.client.pending)
    assert not pair.client.can_open()
    pair.client.go_away()
    pair.client.ping(b"12345678")
    assert not len(pair.client.pending)


def test_eof_is_no_clean_end() -> None:
    """A transport that just ends cuts its streams off; that must not look like END_STREAM."""
    pair = Pair()
    _, sink, *_ = pair.tunnel()
    pair.client.eof()
    assert sink.events[1:] == [("reset", ErrorCode.CONNECT_ERROR)]


def test_reprs_are_for_people() -> None:
    """Long-lived objects say who they are and how they are."""
    pair = Pair()
    ours, *_ = pair.tunnel()
    assert repr(ours) == "<Stream 1 open, 10.0.0.2:8080, window 1048576>"
    assert repr(pair.client) == "<Connection client open, 1 streams, window 16777216>"
    pair.client.go_away()
    assert "draining" in repr(pair.client)
    pair.client.eof()
    assert "closed" in repr(pair.client)
    assert repr(pair.pool).startswith("<OutputPool 0 taken")
