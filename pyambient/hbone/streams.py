"""Streams: one per tunnelled TCP connection, and the table of their states.

The states are those of RFC 9113 section 5.1 with one more distinction: until its CONNECT is
answered a stream is *requested*, and no tunnel yet. The table says what may happen in which state
and what comes next. What it does not hold is forbidden: to us by LocalProtocolError, to the peer
by a stream error, whose code the table gives where it is not PROTOCOL_ERROR.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Final

from .errors import ErrorCode, LocalProtocolError, StreamError
from .frames import MAX_31_BITS
from .headers import Headers
from .interface import Role, StreamSink

if TYPE_CHECKING:
    from .connection import Connection
    from .request import ConnectRequest


class State(enum.IntEnum):
    """Where a stream is in its life."""

    IDLE = 0
    REQUESTED = 1
    REQUESTED_ENDED = 2
    OPEN = 3
    HALF_CLOSED_LOCAL = 4
    HALF_CLOSED_REMOTE = 5
    CLOSED = 6


class Input(enum.IntEnum):
    """What can happen to a stream. END is the flag END_STREAM, after the frame that has it."""

    SEND_HEADERS = 0
    SEND_DATA = 1
    SEND_END = 2
    RECV_HEADERS = 3
    RECV_DATA = 4
    RECV_END = 5


_Table = dict[tuple[State, Input], State | ErrorCode]

# A tunnel, from its 200 on: the same for both ends. RECV_HEADERS are trailers.
_TUNNEL: Final[_Table] = {
    (State.OPEN, Input.SEND_DATA): State.OPEN,
    (State.OPEN, Input.SEND_END): State.HALF_CLOSED_LOCAL,
    (State.OPEN, Input.RECV_DATA): State.OPEN,
    (State.OPEN, Input.RECV_HEADERS): State.OPEN,
    (State.OPEN, Input.RECV_END): State.HALF_CLOSED_REMOTE,
    (State.HALF_CLOSED_LOCAL, Input.RECV_DATA): State.HALF_CLOSED_LOCAL,
    (State.HALF_CLOSED_LOCAL, Input.RECV_HEADERS): State.HALF_CLOSED_LOCAL,
    (State.HALF_CLOSED_LOCAL, Input.RECV_END): State.CLOSED,
    (State.HALF_CLOSED_REMOTE, Input.SEND_DATA): State.HALF_CLOSED_REMOTE,
    (State.HALF_CLOSED_REMOTE, Input.SEND_END): State.CLOSED,
    (State.HALF_CLOSED_REMOTE, Input.RECV_DATA): ErrorCode.STREAM_CLOSED,
    (State.HALF_CLOSED_REMOTE, Input.RECV_HEADERS): ErrorCode.STREAM_CLOSED,
    (State.HALF_CLOSED_REMOTE, Input.RECV_END): ErrorCode.STREAM_CLOSED,
}

# We asked: nothing but an answer may come, and we send nothing but our end before it.
_CLIENT: Final[_Table] = _TUNNEL | {
    (State.IDLE, Input.SEND_HEADERS): State.REQUESTED,
    (State.REQUESTED, Input.RECV_HEADERS): State.OPEN,
    (State.REQUESTED, Input.SEND_END): State.REQUESTED_ENDED,
    (State.REQUESTED_ENDED, Input.RECV_HEADERS): State.HALF_CLOSED_LOCAL,
}

# We were asked: the peer may be early with its bytes and even with its end.
_SERVER: Final[_Table] = _TUNNEL | {
    (State.IDLE, Input.RECV_HEADERS): State.REQUESTED,
    (State.REQUESTED, Input.SEND_HEADERS): State.OPEN,
    (State.REQUESTED, Input.RECV_DATA): State.REQUESTED,
    (State.REQUESTED, Input.RECV_HEADERS): State.REQUESTED,
    (State.REQUESTED, Input.RECV_END): State.REQUESTED_ENDED,
    (State.REQUESTED_ENDED, Input.SEND_HEADERS): State.HALF_CLOSED_REMOTE,
    (State.REQUESTED_ENDED, Input.RECV_DATA): ErrorCode.STREAM_CLOSED,
    (State.REQUESTED_ENDED, Input.RECV_HEADERS): ErrorCode.STREAM_CLOSED,
    (State.REQUESTED_ENDED, Input.RECV_END): ErrorCode.STREAM_CLOSED,
}

_UNANSWERED: Final = frozenset((State.REQUESTED, State.REQUESTED_ENDED))


class _Rules:
    """A table, and the states in which DATA may be sent and received."""

    __slots__ = ("can_receive", "can_send", "table")

    def __init__(self, table: _Table) -> None:
        self.table = table
        allowed = [key for key, target in table.items() if isinstance(target, State)]
        self.can_send = frozenset(s for s, what in allowed if what is Input.SEND_DATA)
        self.can_receive = frozenset(s for s, what in allowed if what is Input.RECV_DATA)


_RULES: Final = {Role.CLIENT: _Rules(_CLIENT), Role.SERVER: _Rules(_SERVER)}


def ignore(view: memoryview) -> None:
    """Where payload of a dead stream goes: it is credited already."""


class Stream:
    """One stream of a connection. The windows are in bytes; `send_window` can be negative.

    `can_send`, `can_receive` and `deliver` repeat what `state` and `sink` say, for the byte path.
    """

    __slots__ = (
        "_rules",
        "_sink",
        "authority",
        "can_receive",
        "can_send",
        "connection",
        "consumed",
        "deliver",
        "full_window",
        "id",
        "receive_window",
        "send_window",
        "state",
    )

    def __init__(
        self,
        connection: Connection,
        stream_id: int,
        request: ConnectRequest,
        windows: tuple[int, int],
        sink: StreamSink | None = None,
    ) -> None:
        """An idle stream; `windows` are what we may send and what the peer may, to begin with."""
        self.connection = connection
        self.id = stream_id
        # The rest of the request is its reader's: an idle stream must not hold half a kilobyte.
        self.authority = request.authority
        self.state = State.IDLE
        self.can_send = self.can_receive = False
        self.send_window, self.full_window = windows
        # full_window = receive_window + consumed + what was delivered and not yet consumed;
        # `consumed` bytes wait for the next WINDOW_UPDATE.
        self.receive_window = self.full_window
        self.consumed = 0
        self._rules = _RULES[connection.role]
        self._sink: StreamSink = EarlyData(self) if sink is None else sink
        self.deliver: Callable[[memoryview], None] = self._sink.data

    @property
    def sink(self) -> StreamSink:
        return self._sink

    @sink.setter
    def sink(self, sink: StreamSink) -> None:
        """Hand the stream over; what happened to it before is told first."""
        before, self._sink = self._sink, sink
        if self.state is not State.CLOSED:
            self.deliver = sink.data
        if isinstance(before, EarlyData):
            before.retell(sink)

    @property
    def closed(self) -> bool:
        return self.state is State.CLOSED

    @property
    def unanswered(self) -> bool:
        return self.state in _UNANSWERED

    @property
    def uncredited(self) -> int:
        """Bytes that the sink was given and has not credited."""
        return self.full_window - self.receive_window - self.consumed

    def process(self, happening: Input) -> None:
        """Go where the table says."""
        target = self._rules.table.get((self.state, happening))
        if isinstance(target, State):
            self._enter(target)
        elif happening < Input.RECV_HEADERS:
            raise LocalProtocolError(f"{happening.name} on {self!r}")
        else:
            code = ErrorCode.PROTOCOL_ERROR if target is None else target
            raise StreamError(code, f"{happening.name} on {self!r}")

    def _enter(self, state: State) -> None:
        self.state = state
        self.can_send = state in self._rules.can_send
        self.can_receive = state in self._rules.can_receive

    def close(self) -> None:
        """By reset or with the connection, in whatever state: nothing is delivered any more."""
        self._enter(State.CLOSED)
        self.deliver = ignore

    def charge(self, length: int) -> None:
        """Account for a DATA frame of `length` bytes; StreamError if it may not be."""
        self.process(Input.RECV_DATA)
        if length > self.receive_window:
            raise StreamError(ErrorCode.FLOW_CONTROL_ERROR, f"window overrun on {self!r}")
        self.receive_window -= length

    def window_update(self, increment: int) -> None:
        """The peer lets us send more."""
        if not increment:
            raise StreamError(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE by 0 on {self!r}")
        self.change_window(increment)

    def change_window(self, increment: int) -> None:
        """The send window moves; by SETTINGS also down, even below 0."""
        window = self.send_window + increment
        if window > MAX_31_BITS:
            raise StreamError(ErrorCode.FLOW_CONTROL_ERROR, f"send window of {window}")
        self.send_window = window

    def __repr__(self) -> str:
        state = self.state.name.lower().replace("_", " ")
        return f"<Stream {self.id} {state}, {self.authority}, window {self.send_window}>"


class EarlyData:
    """The sink of a request that nobody has taken yet: keeps what comes, and retells it.

    A client has no reason to send before its 200, so it may not send much.
    """

    __slots__ = ("_code", "_data", "_ended", "_stream")

    MAX: ClassVar[int] = 64 << 10

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._data = bytearray()
        self._ended = False
        self._code: int | None = None

    def retell(self, sink: StreamSink) -> None:
        """Tell `sink` what has happened so far."""
        if self._code is not None:
            sink.reset(self._code)
            return
        if self._data:
            sink.data(memoryview(self._data))
        if self._ended:
            sink.ended()

    def data(self, view: memoryview) -> None:
        self._data += view
        if len(self._data) > self.MAX:
            self._code = int(ErrorCode.ENHANCE_YOUR_CALM)
            self._stream.connection.reset(self._stream, self._code)

    def ended(self) -> None:
        self._ended = True

    def reset(self, code: int) -> None:
        self._code = code

    def answered(self, status: int, headers: Headers) -> None:
        """Only servers have requests that wait."""

    def writable(self) -> None:
        """Nothing is sent before the answer."""


class Fate(enum.Enum):
    """How a stream that is gone has ended: whether the peer may still have frames under way."""

    ENDED = "the peer ended it"
    RESET = "we reset it"


class Gone:
    """The last streams that are gone, to tell late frames from wrong ones. Bounded."""

    __slots__ = ("_fates",)

    REMEMBERED: ClassVar[int] = 512

    def __init__(self) -> None:
        # A dict finds its first key by passing over all that were deleted before it.
        self._fates: OrderedDict[int, Fate] = OrderedDict()

    def add(self, stream_id: int, fate: Fate) -> None:
        self._fates[stream_id] = fate
        if len(self._fates) > self.REMEMBERED:
            self._fates.popitem(last=False)

    def note_end(self, stream_id: int) -> None:
        """The peer has ended it as well: nothing of it is under way any more."""
        if stream_id in self._fates:
            self._fates[stream_id] = Fate.ENDED

    def fate(self, stream_id: int) -> Fate | None:
        """None if it is forgotten or never was."""
        return self._fates.get(stream_id)
