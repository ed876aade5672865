"""The table of stream states."""

from __future__ import annotations

import itertools

import pytest

from pyambient.hbone import ConnectRequest, ErrorCode, LocalProtocolError, Role, Stream
from pyambient.hbone.errors import StreamError
from pyambient.hbone.streams import Fate, Gone, Input, State

from .helpers import client, server

CONNECTIONS = {Role.CLIENT: client().connection, Role.SERVER: server().connection}


def _stream(role: Role) -> Stream:
    return Stream(CONNECTIONS[role], 1, ConnectRequest("a:1"), (100, 100))


def _reach(role: Role, path: tuple[Input, ...]) -> Stream | None:
    """The stream after `path`, or None if that is no path."""
    stream = _stream(role)
    for happening in path:
        try:
            stream.process(happening)
        except (LocalProtocolError, StreamError):
            return None
    return stream


PATHS = [
    p for n in range(6) for p in itertools.product(Input, repeat=n) if Input.SEND_DATA not in p
]


@pytest.mark.parametrize("role", Role)
def test_closed_means_both_have_ended(role: Role) -> None:
    """On every path through the table CLOSED is where both END_STREAMs lead, and only they."""
    seen = set()
    for path in PATHS:
        stream = _reach(role, path)
        if stream is not None:
            ends = {Input.SEND_END, Input.RECV_END} <= set(path)
            assert (stream.state is State.CLOSED) is ends
            seen.add(stream.state)
    assert seen == set(State)


@pytest.mark.parametrize("role", Role)
def test_nobody_ends_twice(role: Role) -> None:
    """No path has the same side's END_STREAM twice, or anything of a side behind its end."""
    for path in PATHS:
        if _reach(role, path) is not None:
            for end, kinds in (
                (Input.SEND_END, {Input.SEND_HEADERS, Input.SEND_END}),
                (Input.RECV_END, {Input.RECV_HEADERS, Input.RECV_DATA, Input.RECV_END}),
            ):
                if end in path:
                    assert not kinds & set(path[path.index(end) + 1 :])


@pytest.mark.parametrize("role", Role)
def test_the_byte_path_flags_repeat_the_table(role: Role) -> None:
    """`can_send` and `can_receive` say what `process` would."""
    for path in PATHS:
        stream = _reach(role, path)
        if stream is None:
            continue
        state = stream.state
        for happening, flag in (
            (Input.SEND_DATA, stream.can_send),
            (Input.RECV_DATA, stream.can_receive),
        ):
            try:
                stream.process(happening)
            except (LocalProtocolError, StreamError):
                assert not flag
            else:
                assert flag
                assert stream.state is state


def test_bytes_flow_only_in_a_tunnel() -> None:
    """Nobody sends DATA before the answer, except an impatient client."""
    for role, happening, allowed in (
        (Role.CLIENT, Input.SEND_DATA, False),
        (Role.CLIENT, Input.RECV_DATA, False),
        (Role.SERVER, Input.SEND_DATA, False),
        (Role.SERVER, Input.RECV_DATA, True),
    ):
        asked = Input.SEND_HEADERS if role is Role.CLIENT else Input.RECV_HEADERS
        assert (_reach(role, (asked, happening)) is not None) is allowed


def test_errors_blame_the_right_side() -> None:
    """What we do wrong is a LocalProtocolError, what the peer does a StreamError with its code."""
    stream = _stream(Role.SERVER)
    with pytest.raises(LocalProtocolError, match="SEND_DATA on <Stream 1 idle"):
        stream.process(Input.SEND_DATA)
    with pytest.raises(StreamError) as caught:
        stream.process(Input.RECV_DATA)
    assert caught.value.code == ErrorCode.PROTOCOL_ERROR
    stream.process(Input.RECV_HEADERS)
    stream.process(Input.RECV_END)
    with pytest.raises(StreamError) as caught:
        stream.process(Input.RECV_DATA)
    assert caught.value.code == ErrorCode.STREAM_CLOSED


def test_gone_streams_are_remembered_for_a_while() -> None:
    """The memory of gone streams is bounded; the oldest are forgotten first."""
    gone = Gone()
    for stream_id in range(1, 2 * Gone.REMEMBERED + 3, 2):
        gone.add(stream_id, Fate.RESET)
    assert gone.fate(1) is None
    assert gone.fate(3) is Fate.RESET
    assert gone.fate(2 * Gone.REMEMBERED + 1) is Fate.RESET
