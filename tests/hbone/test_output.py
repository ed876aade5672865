"""The output: order, bounds, and who holds a buffer."""

from __future__ import annotations

import os

import pytest

from pyambient.hbone import Connection, LocalProtocolError, Output, OutputPool, Stream
from pyambient.hbone.frames import PING
from pyambient.hbone.output import Outbox

from .helpers import Pair, cut, send, take


def _reserve(connection: Connection, stream: Stream) -> memoryview:
    return connection.reserve(stream, 100)


def test_control_frames_keep_their_place_among_data() -> None:
    """Frames leave in the order of the calls, whatever their kind."""
    pair = Pair()
    ours, *_ = pair.tunnel()
    send(pair.client, ours, b"one")
    pair.client.ping(b"12345678")
    send(pair.client, ours, b"two")
    pair.client.end(ours)
    kinds = [(kind, payload) for kind, _, _, payload in cut(take(pair.client))]
    assert kinds == [(0, b"one"), (PING, b"12345678"), (0, b"two"), (0, b"")]


def test_reserved_bytes_are_not_copied() -> None:
    """The reserved view lies in the output itself, nine bytes behind what is pending."""
    pair = Pair()
    ours, *_ = pair.tunnel()
    view = pair.client.reserve(ours, 5)
    view[:] = b"hello"
    pair.client.commit(ours, 5)
    view[:] = b"HELLO"
    assert bytes(pair.client.pending) == b"\0\0\x05\0\0\0\0\0\x01HELLO"


def test_a_reserve_without_commit_leaves_no_trace() -> None:
    """An app that had nothing to say costs neither bytes nor a buffer."""
    pair = Pair()
    ours, *_ = pair.tunnel()
    assert len(_reserve(pair.client, ours)) == 100
    assert pair.pool.taken == 0
    assert not len(pair.client.pending)
    send(pair.client, ours, b"x")
    assert len(_reserve(pair.client, ours)) == 100
    assert len(pair.client.pending) == 10


def test_commit_less_than_reserved() -> None:
    """Only what was received is sent and counted."""
    pair = Pair()
    ours, *_, sink = pair.tunnel()
    window = ours.send_window
    view = _reserve(pair.client, ours)
    view[:3] = b"abc"
    pair.client.commit(ours, 3)
    pair.run()
    assert sink.received == b"abc"
    assert ours.send_window == window - 3


def test_wrong_commits() -> None:
    """A commit must follow its reserve, once, and stay inside it."""
    pair = Pair()
    ours, *_ = pair.tunnel()
    with pytest.raises(LocalProtocolError):
        pair.client.commit(ours, 1)
    _reserve(pair.client, ours)
    with pytest.raises(LocalProtocolError):
        pair.client.commit(ours, 101)
    with pytest.raises(LocalProtocolError):
        pair.client.commit(ours, 0)
    pair.client.commit(ours, 100)
    with pytest.raises(LocalProtocolError):
        pair.client.commit(ours, 1)
    _reserve(pair.client, ours)
    pair.client.ping(b"12345678")
    with pytest.raises(LocalProtocolError):
        pair.client.commit(ours, 1)


def test_only_unsent_bytes_hold_a_buffer() -> None:
    """A connection takes an output with its first byte and gives it back with its last."""
    pair = Pair()
    ours, *_ = pair.tunnel()
    assert pair.pool.taken == 0
    send(pair.client, ours, b"hello")
    assert pair.pool.taken == 1
    pair.client.sent(13)
    assert pair.pool.taken == 1
    assert bytes(pair.client.pending) == b"o"
    pair.client.sent(1)
    assert pair.pool.taken == 0
    with pytest.raises(LocalProtocolError):
        pair.client.sent(1)


def test_pool_keeps_few() -> None:
    """The pool lends any number of outputs and keeps a few."""
    pool = OutputPool(size=1000, keep=2)
    first = pool.peek()
    assert pool.take() is first
    others = [pool.take() for _ in range(5)]
    assert pool.taken == 6
    first.end = 5
    for output in [first, *others]:
        pool.give(output)
    assert pool.taken == 0
    assert len({id(pool.take()) for _ in range(2)} & {id(first), *map(id, others)}) == 2
    assert first.end == 0
    assert repr(Output(10)) == "<Output 0 of 10 bytes unsent>"


@pytest.mark.parametrize("piece", [1, 7, 100, 5000])
def test_small_output_and_slow_transport(piece: int) -> None:
    """Bytes survive an output that is full most of the time and a transport that nibbles."""
    pair = Pair(output_size=4096)
    ours, *_, sink = pair.tunnel()
    payload = os.urandom(20_000)
    sent = pings = 0
    while len(sink.received) < len(payload):
        sent += send(pair.client, ours, payload[sent:])
        if pings < 50:
            pings += 1
            pair.client.ping(b"12345678")
        count = min(piece, len(pair.client.pending))
        pair.server.receive(memoryview(bytes(pair.client.pending[:count])))
        pair.client.sent(count)
        pair.client.receive(memoryview(take(pair.server)))
    assert sink.received == payload


def test_full_output_wakes_when_it_is_empty() -> None:
    """A stream that found the output full is told when it may go on."""
    pair = Pair(output_size=4096)
    ours, client_sink, *_ = pair.tunnel()
    assert send(pair.client, ours, bytes(10_000)) == 4096 - 128 - 9
    assert "writable" not in client_sink.events
    pair.client.sent(1000)
    assert "writable" not in client_sink.events
    pair.client.sent(len(pair.client.pending))
    assert client_sink.events[-1] == "writable"


def test_spill_is_sent_in_order() -> None:
    """Control frames over the buffer's end wait behind it, and DATA behind them."""
    box = Outbox(OutputPool(size=1000))
    expected = b""
    for n in range(150):
        frame = bytes((n,)) * 20
        expected += frame
        box.put(frame)
    assert box.spilled
    assert not box.room()
    out = b""
    while len(view := box.pending()):
        out += bytes(view[:333])
        box.sent(min(333, len(view)))
    assert out == expected
    assert box.empty
    assert not box.spilled
    assert box.room() == 1000 - 31 - 9
    assert repr(box) == "<Outbox 0 bytes pending, 0 spilled>"
