"""What is fuzzed: functions of arbitrary bytes that raise when something is wrong.

They know nothing of the fuzzer, so that the inputs it once found are ordinary test cases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import hpack

from pyambient.hbone import RemoteProtocolError, Role
from pyambient.hbone.errors import StreamError
from pyambient.hbone.frames import PING, WINDOW_UPDATE
from pyambient.hbone.headers import FieldDecoder, Fields
from pyambient.hbone.request import ConnectRequest, parse_request
from pyambient.model.address import HostPort, parse_authority
from pyambient.proxy.inbound import forwarded_host
from tests.hbone.helpers import REQUEST, Peer, Sink, cut, give, take

_MAX_LIST = 4096
_OPENED = 3
Target = Callable[[bytes], None]


def frames(raw: bytes) -> None:
    """The frame cutter: bytes of a peer behind its preface, whole and cut, mean the same.

    The first byte says whose peer it is, whether its payload is credited, and where to cut.
    """
    if not raw:
        return
    how, session = raw[0], raw[1:]
    role = Role.SERVER if how & 1 else Role.CLIENT
    hold, piece = bool(how & 2), 1 + (how >> 2)
    whole = _heard(role, [session], hold=hold)
    pieces = [session[start : start + piece] for start in range(0, len(session), piece)]
    assert _heard(role, pieces, hold=hold) == whole


def _heard(role: Role, pieces: list[bytes], *, hold: bool) -> list[Any]:
    """What the sinks, the owner and the peer hear of these pieces, and how it ends."""
    peer = Peer(role, hold=hold)
    sinks = [_opened(peer, hold=hold) for _ in range(_OPENED)] if role is Role.CLIENT else []
    out, error = bytearray(take(peer.connection)), None
    for piece in pieces:
        try:
            give(peer.connection, piece)
        except RemoteProtocolError as caught:
            error = (caught.code, caught.text)
        out += take(peer.connection)
        _check_books(peer)
    sinks += peer.owner.sinks.values()
    return [
        error,
        [(bytes(sink.received), sink.events) for sink in sinks],
        # `drained` waits for output to be taken, which is done once a piece.
        [[event for event in peer.owner.events if event != "drained"], peer.owner.requests],
        # When windows are opened depends on the cuts; that they are is what the books say.
        [frame for frame in cut(bytes(out)) if frame[0] not in (WINDOW_UPDATE, PING)],
    ]


def _opened(peer: Peer, *, hold: bool) -> Sink:
    sink = Sink(hold=hold)
    sink.stream = peer.connection.open(REQUEST, sink)
    return sink


def _check_books(peer: Peer) -> None:
    """All of the connection's window is somewhere, what is kept is bounded, the end is one."""
    connection = peer.connection
    if connection.closed:
        assert not connection.streams
        return
    streams = connection.streams.values()
    held = sum(stream.uncredited for stream in streams)
    # Payload of the frame under way is charged when its header comes.
    books = connection._receive_window + connection._consumed + held
    assert books == connection.settings.connection_window
    assert all(0 <= stream.uncredited <= stream.full_window for stream in streams)
    assert len(connection._tail) <= connection.settings.max_header_list + 9
    assert len(streams) <= connection.settings.max_streams_accepted


def connect(raw: bytes) -> None:
    """The CONNECT parser: header blocks of one connection, each behind its length (two bytes).

    hpack is the oracle of what a block says; what we make of it can be said and read again.
    """
    ours, theirs = FieldDecoder(_MAX_LIST), hpack.Decoder(max_header_list_size=_MAX_LIST)
    for block in _blocks(raw):
        try:
            expected: Fields | None = tuple(theirs.decode(block, raw=True))
        except hpack.HPACKError:
            expected = None
        try:
            fields = ours.decode(block)
        except RemoteProtocolError:
            assert expected is None
            return
        assert fields == expected
        _read_request(fields)


def _blocks(raw: bytes) -> Iterator[bytes]:
    while len(raw) > 2:
        length = int.from_bytes(raw[:2], "big")
        yield raw[2 : 2 + length]
        raw = raw[2 + length :]


def _read_request(fields: Fields) -> None:
    try:
        request = parse_request(fields)
    except StreamError:
        return
    again = FieldDecoder(1 << 20).decode(request.encode())
    assert parse_request(again) == request
    _read_authority(request)
    host = forwarded_host(request.forwarded)
    assert host is None or host.isascii()


def _read_authority(request: ConnectRequest) -> None:
    """An authority that is accepted is one address, however it is spelled."""
    with contextlib.suppress(ValueError):
        address = parse_authority(request.authority)
        assert parse_authority(str(address)) == address
        assert 0 < address.port < 65536
        if not isinstance(address, HostPort):
            address.sockaddr()


TARGETS: dict[str, Target] = {"frames": frames, "connect": connect}
