"""Property: however the bytes between us and hyper-h2 are cut, both ends get what was sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import example, given, settings
from hypothesis import strategies as st

from .helpers import give, send, take
from .test_interop_h2 import Client, Server

SIZES = st.lists(st.integers(1, 4000), min_size=1, max_size=8)
PAYLOADS = st.lists(st.binary(max_size=3000), min_size=1, max_size=5)


class _Cutting:
    """Carries bytes in pieces of the sizes given, over and over."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = itertools.cycle(sizes)
        super().__init__()

    def pieces(self, raw: bytes) -> Iterator[bytes]:
        while raw:
            size = next(self.sizes)
            yield raw[:size]
            raw = raw[size:]

    def run(self) -> None:
        while True:
            forth, back = take(self.ours), self.h2.data_to_send()
            if not forth and not back:
                return
            for piece in self.pieces(forth):
                for event in self.h2.receive_data(piece):
                    self._note(event)
            for piece in self.pieces(back):
                give(self.ours, piece)


class CutServer(_Cutting, Server):
    """Our server, an h2 client."""


class CutClient(_Cutting, Client):
    """Our client, an h2 server."""


def _exchange(peer, stream, payloads: list[bytes]) -> None:
    for payload in payloads:
        assert send(peer.ours, stream, payload) == len(payload)
        peer.send(stream.id, payload)
        peer.run()
    peer.ours.end(stream)
    peer.h2.end_stream(stream.id)
    peer.run()


@given(SIZES, PAYLOADS)
@example([1], [b"byte by byte"])
@settings(max_examples=60, deadline=None)
def test_our_server_and_h2_through_any_cuts(sizes: list[int], payloads: list[bytes]) -> None:
    """Two streams of an h2 client, one after the other, whole in both directions."""
    peer = CutServer(sizes)
    for _ in range(2):
        stream_id = peer.connect()
        _exchange(peer, peer.ours.streams[stream_id], payloads)
        assert peer.owner.sinks[stream_id].received == b"".join(payloads)
        assert peer.owner.sinks[stream_id].events == ["ended"]
        assert peer.received.get(stream_id, b"") == b"".join(payloads)
    assert peer.ours.open_count == 0


@given(SIZES, PAYLOADS)
@example([1], [b"byte by byte"])
@settings(max_examples=60, deadline=None)
def test_our_client_and_h2_through_any_cuts(sizes: list[int], payloads: list[bytes]) -> None:
    """Likewise with the roles turned."""
    peer = CutClient(sizes)
    for _ in range(2):
        stream_id, sink = peer.connect()
        _exchange(peer, peer.ours.streams[stream_id], payloads)
        assert sink.received == b"".join(payloads)
        assert sink.events == [("answered", 200, ()), "ended"]
        assert peer.received.get(stream_id, b"") == b"".join(payloads)
    assert peer.ours.open_count == 0
