"""Our ends against plain hyper-h2, which nobody here wrote."""

from __future__ import annotations

import os

import h2.errors
import h2.events
import h2.settings
import hyperframe.frame
import pytest

from pyambient.hbone import Connection, ErrorCode, OutputPool, Role

from .helpers import AUTHORITY, CONNECT, REQUEST, H2Peer, Owner, Sink, give, send, take


class Server(H2Peer):
    """Our server, an h2 client."""

    def __init__(self, *, accept: bool = True) -> None:
        self.owner = Owner(accept=accept)
        connection = Connection(Role.SERVER, self.owner, OutputPool())
        super().__init__(connection, is_client=True)

    def connect(self, *, end: bool = False) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, CONNECT, end_stream=end)
        self.run()
        return stream_id


class Client(H2Peer):
    """Our client, an h2 server."""

    def __init__(self) -> None:
        self.owner = Owner()
        connection = Connection(Role.CLIENT, self.owner, OutputPool())
        super().__init__(connection, is_client=False)

    def connect(self, status: str | None = "200") -> tuple[int, Sink]:
        sink = Sink()
        stream = sink.stream = self.ours.open(REQUEST, sink)
        self.run()
        if status is not None:
            self.h2.send_headers(stream.id, [(":status", status)])
            self.run()
        return stream.id, sink


def test_client_connects() -> None:
    """An h2 server takes our CONNECT for what it is, and we its answer."""
    peer = Client()
    stream_id, sink = peer.connect()
    (request,) = peer.of(h2.events.RequestReceived)
    assert request.headers == [(":method", "CONNECT"), (":authority", AUTHORITY)]
    assert stream_id == 1
    assert sink.events == [("answered", 200, ())]


def test_client_headers_with_dynamic_table() -> None:
    """Answers that refer to the dynamic table are understood, stream after stream."""
    peer = Client()
    for n in range(20):
        sink = Sink()
        stream = peer.ours.open(REQUEST, sink)
        peer.run()
        headers = [("baggage", "service.name=app"), ("date", f"today {n % 3}")]
        peer.h2.send_headers(stream.id, [(":status", "200"), *headers])
        peer.run()
        assert sink.events == [("answered", 200, tuple(headers))]
    assert len(peer.h2.encoder.header_table.dynamic_entries) == 4


def test_client_skips_informational_answers() -> None:
    """1xx answers are not the answer."""
    peer = Client()
    stream_id, sink = peer.connect(status=None)
    peer.h2.send_headers(stream_id, [(":status", "103"), ("link", "</>")])
    peer.run()
    assert sink.events == []
    peer.h2.send_headers(stream_id, [(":status", "200")])
    peer.run()
    assert sink.events == [("answered", 200, ())]


def test_client_takes_trailers_as_the_end() -> None:
    """Trailers end the peer's direction like an empty DATA frame with END_STREAM."""
    peer = Client()
    stream_id, sink = peer.connect()
    peer.h2.send_data(stream_id, b"bytes")
    peer.h2.send_headers(stream_id, [("checksum", "1")], end_stream=True)
    peer.run()
    assert sink.received == b"bytes"
    assert sink.events == [("answered", 200, ()), "ended"]


def test_client_bulk() -> None:
    """Megabytes through h2's small windows and frames arrive whole, both ways."""
    peer = Client()
    stream_id, sink = peer.connect()
    stream = peer.ours.streams[stream_id]
    up, down = os.urandom(1_000_000), os.urandom(1_000_000)
    sent = 0
    while sent < len(up):
        sent += send(peer.ours, stream, up[sent:])
        peer.run()
    peer.ours.end(stream)
    peer.run()
    assert peer.received[stream_id] == up
    assert len(peer.of(h2.events.StreamEnded)) == 1
    peer.send(stream_id, down)
    peer.h2.end_stream(stream_id)
    peer.run()
    assert sink.received == down
    assert sink.events[-1] == "ended"
    assert peer.ours.open_count == 0


def test_client_never_sends_more_than_the_peer_allows() -> None:
    """Without credit from the peer we stop at its window, in frames of its size."""
    peer = Client()
    peer.credit = False
    stream_id, sink = peer.connect()
    stream = peer.ours.streams[stream_id]
    assert send(peer.ours, stream, bytes(100_000)) == 65535
    peer.run()
    sizes = [len(event.data) for event in peer.of(h2.events.DataReceived)]
    assert max(sizes) == 16384
    assert sum(sizes) == 65535
    assert "writable" not in sink.events
    peer.h2.acknowledge_received_data(65535, stream_id)
    peer.run()
    assert sink.events[-1] == "writable"


def test_server_accepts() -> None:
    """An h2 client's CONNECT is answered; its end and ours close the stream."""
    peer = Server()
    stream_id = peer.connect()
    assert [request.authority for request in peer.owner.requests] == [AUTHORITY]
    (answer,) = peer.of(h2.events.ResponseReceived)
    assert answer.headers == [(":status", "200")]
    peer.h2.end_stream(stream_id)
    peer.run()
    assert peer.owner.sinks[stream_id].events == ["ended"]
    peer.ours.end(peer.owner.streams[0])
    peer.run()
    assert len(peer.of(h2.events.StreamEnded)) == 1
    assert peer.ours.open_count == 0


def test_server_refuses() -> None:
    """A refusal reaches an h2 client as a complete answer, then the harmless reset."""
    peer = Server(accept=False)
    stream_id = peer.connect()
    peer.ours.refuse(peer.owner.streams[0], 503)
    peer.run()
    (answer,) = peer.of(h2.events.ResponseReceived)
    assert answer.headers == [(":status", "503")]
    assert [event.stream_id for event in peer.of(h2.events.StreamEnded)] == [stream_id]
    (reset,) = peer.of(h2.events.StreamReset)
    assert reset.error_code == h2.errors.ErrorCodes.NO_ERROR


@pytest.mark.parametrize(
    "headers",
    [
        [(":method", "GET"), (":scheme", "https"), (":authority", AUTHORITY), (":path", "/")],
        [(":method", "POST"), (":scheme", "https"), (":authority", AUTHORITY), (":path", "/")],
    ],
)
def test_server_answers_400_to_other_methods(headers: list[tuple[str, str]]) -> None:
    """An h2 client that is no HBONE client gets a 400, and the owner is told why."""
    peer = Server()
    stream_id = peer.h2.get_next_available_stream_id()
    peer.h2.send_headers(stream_id, headers, end_stream=True)
    peer.run()
    (answer,) = peer.of(h2.events.ResponseReceived)
    assert answer.headers == [(":status", "400")]
    assert peer.owner.events == [
        "settled",
        ("refused", stream_id, 400, "the method is not CONNECT"),
    ]
    assert peer.owner.requests == []


def test_server_requests_with_dynamic_table() -> None:
    """Requests that refer to the dynamic table are understood, also behind a refused one."""
    peer = Server()
    baggage = ("baggage", "k8s.namespace.name=default")
    for n in range(20):
        stream_id = peer.h2.get_next_available_stream_id()
        method = (":method", "CONNECT") if n % 4 else (":method", "GET")
        rest = [] if n % 4 else [(":scheme", "https"), (":path", "/")]
        peer.h2.send_headers(stream_id, [method, (":authority", AUTHORITY), *rest, baggage])
        peer.run()
    assert len(peer.owner.requests) == 15
    assert {request.baggage for request in peer.owner.requests} == {baggage[1]}


def test_server_bulk() -> None:
    """Megabytes arrive whole, both ways, at the sizes and windows we offer."""
    peer = Server()
    stream_id = peer.connect()
    up, down = os.urandom(6_000_000), os.urandom(500_000)
    peer.send(stream_id, up)
    assert peer.owner.sinks[stream_id].received == up
    sent, stream = 0, peer.owner.streams[0]
    while sent < len(down):
        sent += send(peer.ours, stream, down[sent:])
        peer.run()
    assert peer.received[stream_id] == down


def test_server_offers_our_settings() -> None:
    """An h2 client sees ztunnel's numbers, but for the window of a stream that shares."""
    peer = Server()
    settings = peer.h2.remote_settings
    assert settings.initial_window_size == 1 << 20
    assert settings.max_frame_size == 1 << 20
    assert settings.max_concurrent_streams == 200
    assert settings.max_header_list_size == 64 << 10
    assert settings.enable_push == 0
    assert peer.h2.outbound_flow_control_window == 16 << 20


@pytest.mark.parametrize("padding", [0, 1, 255])
@pytest.mark.parametrize("size", [0, 1, 10_000])
def test_padded_frames_of_hyperframe(size: int, padding: int) -> None:
    """Padding is taken off, and counts for the windows as RFC 9113 section 6.1 wants."""
    peer = Server()
    stream_id = peer.connect()
    payload = os.urandom(size)
    frame = hyperframe.frame.DataFrame(stream_id, payload, pad_length=padding)
    frame.flags.add("PADDED")
    stream = peer.ours.streams[stream_id]
    before = stream.receive_window + stream.consumed
    give(peer.ours, frame.serialize())
    assert peer.owner.sinks[stream_id].received == payload
    assert stream.receive_window + stream.consumed == before
    assert stream.consumed == size + padding + 1


def test_padded_headers_of_hyperframe() -> None:
    """A HEADERS frame may be padded and carry a priority."""
    peer = Server()
    frame = hyperframe.frame.HeadersFrame(1, peer.h2.encoder.encode(list(CONNECT)), pad_length=200)
    for flag in ("END_HEADERS", "PADDED", "PRIORITY"):
        frame.flags.add(flag)
    frame.depends_on, frame.stream_weight, frame.exclusive = 0, 15, False
    give(peer.ours, frame.serialize())
    assert [request.authority for request in peer.owner.requests] == [AUTHORITY]


def test_pings_are_answered_both_ways() -> None:
    """The peer's PING is answered at once; an answer to ours counts."""
    peer = Server()
    peer.h2.ping(b"from h2.")
    peer.run()
    (answer,) = peer.of(h2.events.PingAckReceived)
    assert answer.ping_data == b"from h2."
    peer.ours.ping(b"from us.")
    peer.ours.ping(b"again...")
    assert peer.ours.pings_unanswered == 2
    peer.run()
    assert peer.ours.pings_unanswered == 0


def test_smaller_header_table_is_obeyed() -> None:
    """A peer that shrinks its header table may do so at any time: we never use it."""
    peer = Client()
    peer.h2.update_settings({h2.settings.SettingCodes.HEADER_TABLE_SIZE: 0})
    peer.run()
    for _ in range(3):
        _, sink = peer.connect()
        assert sink.events == [("answered", 200, ())]
    assert len(peer.of(h2.events.RequestReceived)) == 3


def test_goaway_of_h2_drains_the_client() -> None:
    """After GOAWAY what is open goes on and nothing more is opened."""
    peer = Client()
    stream_id, sink = peer.connect()
    peer.h2.close_connection(last_stream_id=stream_id)
    give(peer.ours, peer.h2.data_to_send())
    assert peer.owner.events == ["settled", ("goaway", ErrorCode.NO_ERROR)]
    assert not peer.ours.can_open()
    give(peer.ours, b"\0\0\x02\0\1\0\0\0\x01hi")
    assert sink.received == b"hi"
    peer.ours.end(peer.ours.streams[stream_id])
    take(peer.ours)
    assert peer.owner.events[-1] == "drained"
