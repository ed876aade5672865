"""What is a CONNECT, what is an answer, and the header blocks that carry them."""

from __future__ import annotations

import hpack
import pytest

from pyambient.hbone import ConnectRequest, ErrorCode, LocalProtocolError
from pyambient.hbone.frames import END_HEADERS, END_STREAM, HEADERS, frame

from .helpers import (
    AUTHORITY,
    CONNECT,
    OK,
    REQUEST,
    Pair,
    Peer,
    Sink,
    client,
    continuation,
    server,
)

METHOD, AUTH = CONNECT


def decode(block: bytes, decoder: hpack.Decoder | None = None) -> list[tuple[str, str]]:
    """The fields of a block, as plain pairs."""
    decoder = decoder or hpack.Decoder()
    return [(str(name), str(value)) for name, value in decoder.decode(block)]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ([(":method", "GET"), AUTH], "the method is not CONNECT"),
        ([(":method", "connect"), AUTH], "the method is not CONNECT"),
        ([AUTH], "the request has no method"),
        ([], "the request has no method"),
        ([METHOD], "the CONNECT has no authority"),
        ([METHOD, (":authority", "")], "the CONNECT has no authority"),
        ([METHOD, ("host", AUTHORITY)], "the CONNECT has no authority"),
        ([METHOD, AUTH, (":scheme", "https")], "a CONNECT must not have :scheme"),
        ([METHOD, AUTH, (":path", "/")], "a CONNECT must not have :path"),
        ([METHOD, AUTH, (":protocol", "websocket")], "a CONNECT must not have :protocol"),
        ([METHOD, AUTH, (":status", "200")], "a CONNECT must not have :status"),
        ([METHOD, AUTH, AUTH], ":authority stands twice or behind regular fields"),
        ([METHOD, METHOD, AUTH], ":method stands twice or behind regular fields"),
        ([METHOD, ("baggage", "a=b"), AUTH], ":authority stands twice or behind regular fields"),
        ([*CONNECT, ("Baggage", "a=b")], "forbidden characters in the field name 'Baggage'"),
        ([*CONNECT, ("a b", "c")], "forbidden characters in the field name 'a b'"),
        ([*CONNECT, ("", "c")], "forbidden characters in the field name ''"),
        ([*CONNECT, ("baggage", "a\r\nb")], "a value of baggage has forbidden characters"),
        ([*CONNECT, ("baggage", "a\0b")], "a value of baggage has forbidden characters"),
        ([*CONNECT, ("baggage", " a")], "a value of baggage has forbidden characters"),
        ([*CONNECT, ("baggage", "a\t")], "a value of baggage has forbidden characters"),
        ([*CONNECT, ("baggage", "a\x1b[2J")], "a value of baggage has forbidden characters"),
        ([METHOD, (":authority", "a b")], "the authority has forbidden characters"),
        ([METHOD, (":authority", "é:1")], "the authority has forbidden characters"),
        (
            [*CONNECT, ("a\nb" * 99, " ")],
            "a value of " + "a\\nb" * 13 + "a has forbidden characters",
        ),
        ([METHOD, (":authority", "a\nb")], "a value of :authority has forbidden characters"),
        ([*CONNECT, ("connection", "close")], "connection is of HTTP/1"),
        ([*CONNECT, ("transfer-encoding", "chunked")], "transfer-encoding is of HTTP/1"),
        ([*CONNECT, ("te", "gzip")], "te is of HTTP/1"),
    ],
)
@pytest.mark.parametrize("end", [False, True])
def test_what_is_no_connect(fields: list[tuple[str, str]], why: str, *, end: bool) -> None:
    """Anything but a well-formed CONNECT is answered 400 and reported, and opens no stream."""
    peer = server()
    answer = peer.give(peer.headers(1, fields, end=end))
    kind, flags, stream_id, block = answer[0]
    assert (kind, flags, stream_id) == (HEADERS, END_HEADERS | END_STREAM, 1)
    assert decode(block) == [(":status", "400")]
    assert [kind for kind, *_ in answer[1:]] == ([] if end else [3])
    assert peer.owner.events == ["settled", ("refused", 1, 400, why)]
    assert peer.connection.open_count == 0


def test_a_refused_request_does_not_hurt_the_next() -> None:
    """After a 400 the connection goes on, and frames under way for it are swallowed."""
    peer = server()
    peer.give(peer.headers(1, [(":method", "POST"), AUTH]))
    assert peer.give(frame(0, 0, 1, b"body") + frame(0, END_STREAM, 1)) == []
    peer.give(peer.connect(3))
    assert peer.owner.requests == [REQUEST]


def test_known_headers() -> None:
    """The four headers of HBONE are told by name; unknown ones are ignored."""
    peer = server()
    fields = [
        *CONNECT,
        ("user-agent", "x"),
        ("traceparent", "00-1-2-00"),
        ("forwarded", 'for="10.0.0.1:1"'),
        ("te", "trailers"),
        ("baggage", ""),
        ("x-forwarded-network", "west"),
    ]
    peer.give(peer.headers(1, fields))
    assert peer.owner.requests == [
        ConnectRequest(AUTHORITY, "", 'for="10.0.0.1:1"', "00-1-2-00", "west")
    ]


def test_several_baggage_fields_are_one_list() -> None:
    """Fields of one name are joined by commas (RFC 9110 section 5.3)."""
    peer = server()
    peer.give(peer.headers(1, [*CONNECT, ("baggage", "a=1"), ("baggage", "b=2")]))
    assert peer.owner.requests[0].baggage == "a=1,b=2"


def test_values_that_are_not_utf_8() -> None:
    """Any bytes in a value become text that can be logged."""
    peer = server()
    peer.give(peer.headers(1, [*CONNECT, (b"baggage", b"a=\xff")]))
    assert peer.owner.requests[0].baggage == "a=\\xff"


def test_connect_with_end_stream() -> None:
    """A CONNECT that half-closes at once is a request, then an end."""
    peer = server()
    peer.give(peer.headers(1, CONNECT, end=True))
    assert peer.owner.sinks[1].events == ["ended"]
    assert len(peer.connection.reserve(peer.owner.streams[0], 10)) == 10


def test_trailers_of_a_client() -> None:
    """Trailers after a CONNECT end the client's direction."""
    peer = server()
    _, sink = peer.accepted()
    peer.give(peer.headers(1, [("checksum", "1")], end=True))
    assert sink.events == ["ended"]


def _breaks_stream(peer: Peer, sink: Sink, raw: bytes, code: ErrorCode) -> None:
    assert peer.give(raw) == [(3, 0, 1, int(code).to_bytes(4, "big"))]
    assert sink.events[-1] == ("reset", code)
    assert not peer.connection.closed
    assert peer.connection.open_count == 0


@pytest.mark.parametrize(
    ("fields", "end"),
    [([("checksum", "1")], False), ([(":status", "200")], True), ([("Bad", "1")], True)],
)
def test_bad_trailers(fields: list[tuple[str, str]], *, end: bool) -> None:
    """Second headers without END_STREAM, or malformed ones, cost the stream."""
    peer = server()
    _, sink = peer.accepted()
    _breaks_stream(peer, sink, peer.headers(1, fields, end=end), ErrorCode.PROTOCOL_ERROR)
    peer = client()
    _, sink = peer.opened()
    _breaks_stream(peer, sink, peer.headers(1, fields, end=end), ErrorCode.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [("server", "envoy")],
        [(":status", "20")],
        [(":status", "2000")],
        [(":status", "abc")],
        [(":status", "000")],
        [(":status", "700")],
        [(":status", "101")],
        [*OK, *OK],
        [*OK, (":path", "/")],
        [*OK, ("Server", "envoy")],
        [*OK, ("upgrade", "h2c")],
    ],
)
def test_malformed_answers(fields: list[tuple[str, str]]) -> None:
    """An answer that is none costs the stream."""
    peer = client()
    sink = Sink()
    peer.connection.open(REQUEST, sink)
    peer.frames()
    _breaks_stream(peer, sink, peer.headers(1, fields), ErrorCode.PROTOCOL_ERROR)


def test_informational_answer_with_end() -> None:
    """A 1xx answer cannot be the end."""
    peer = client()
    sink = Sink()
    peer.connection.open(REQUEST, sink)
    peer.frames()
    raw = peer.headers(1, [(":status", "100")], end=True)
    _breaks_stream(peer, sink, raw, ErrorCode.PROTOCOL_ERROR)


def test_answer_with_end_stream() -> None:
    """A 200 that ends at once is an answer, then an end."""
    peer = client()
    sink = Sink()
    stream = peer.connection.open(REQUEST, sink)
    peer.give(peer.headers(1, OK, end=True))
    assert sink.events == [("answered", 200, ()), "ended"]
    assert len(peer.connection.reserve(stream, 10)) == 10


def test_envoys_end_then_reset_is_harmless() -> None:
    """END_STREAM then RST_STREAM(NO_ERROR), as Envoy ends streams, arrive as just that."""
    peer = client()
    stream, sink = peer.opened()
    peer.give(frame(0, END_STREAM, 1, b"bye") + frame(3, 0, 1, bytes(4)))
    assert sink.received == b"bye"
    assert sink.events[1:] == ["ended", ("reset", ErrorCode.NO_ERROR)]
    stream, sink = peer.opened()
    peer.connection.end(stream)
    peer.give(frame(0, END_STREAM, 3) + frame(3, 0, 3, bytes(4)))
    assert sink.events[1:] == ["ended"]
    assert not peer.connection.closed


def test_block_in_continuations() -> None:
    """A block cut over many frames is one block, END_STREAM of its HEADERS included."""
    peer = server()
    block = peer.block(CONNECT)
    raw = frame(HEADERS, END_STREAM, 1, block[:1])
    for byte in block[1:-1]:
        raw += continuation(1, bytes((byte,)))
    peer.give(raw + continuation(1, block[-1:], end=True))
    assert peer.owner.requests == [REQUEST]
    assert peer.owner.sinks[1].events == ["ended"]


def test_late_headers_keep_the_table_in_step() -> None:
    """Headers of a stream that we have reset are decoded all the same."""
    peer = client()
    first = peer.connection.open(REQUEST, Sink())
    peer.connection.reset(first, ErrorCode.CANCEL)
    peer.give(peer.headers(1, [*OK, ("x-first", "put in the table")]))
    sink = Sink()
    peer.connection.open(REQUEST, sink)
    block = peer.headers(3, [*OK, ("x-first", "put in the table")])
    assert len(block) == 9 + 2
    peer.give(block)
    assert sink.events == [("answered", 200, (("x-first", "put in the table"),))]


def test_encoded_blocks_never_touch_the_table() -> None:
    """Our blocks leave the peer's dynamic table empty, and say so at the start."""
    pair = Pair(accept=False)
    pair.client.open(ConnectRequest(AUTHORITY, "a=b", "for=x", "00-0-0-00", "net"), Sink())
    first = bytes(pair.client.pending)[9:]
    pair.run()
    pair.client.open(ConnectRequest(AUTHORITY, "x" * 5000), Sink())
    second = bytes(pair.client.pending)[9:]
    assert first.startswith(b"\x20")
    assert not second.startswith(b"\x20")
    decoder = hpack.Decoder()
    assert decode(first, decoder) == [
        *CONNECT,
        ("baggage", "a=b"),
        ("forwarded", "for=x"),
        ("traceparent", "00-0-0-00"),
        ("x-forwarded-network", "net"),
    ]
    assert decode(second, decoder) == [*CONNECT, ("baggage", "x" * 5000)]
    assert not decoder.header_table.dynamic_entries


def test_our_own_headers_are_bounded() -> None:
    """A block that would need a CONTINUATION is the caller's mistake."""
    pair = Pair(accept=False)
    with pytest.raises(LocalProtocolError):
        pair.client.open(ConnectRequest(AUTHORITY, "x" * 17_000), Sink())
    pair.open()
    pair.run()
    theirs = pair.server_owner.streams[0]
    with pytest.raises(LocalProtocolError):
        pair.server.accept(theirs, (("baggage", "x" * 17_000),))
    pair.server.accept(theirs)
    assert pair.client.open_count == 1


def test_refusal_of_a_request_that_has_ended() -> None:
    """A request that came with END_STREAM needs no reset after its refusal."""
    peer = server(accept=False)
    peer.give(peer.headers(1, CONNECT, end=True))
    peer.connection.refuse(peer.owner.streams[0], 401)
    ((kind, flags, _, block),) = peer.frames()
    assert (kind, flags) == (HEADERS, END_HEADERS | END_STREAM)
    assert decode(block) == [(":status", "401")]
    assert peer.connection.open_count == 0


@pytest.mark.parametrize("length", [0, 1, 126, 127, 128, 254, 255, 16000])
def test_string_lengths(length: int) -> None:
    """Values of every length around the prefix limits survive HPACK."""
    request = ConnectRequest("a:1", "b" * length)
    assert decode(request.encode())[2:] == [("baggage", "b" * length)]
