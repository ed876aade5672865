"""One end of a connection: its state, and what both directions do to it.

`Connection` is one class in four floors, a file each: `Endpoint` keeps the books, `FrameHandlers`
knows what the peer's frames mean, `Receiver` cuts its bytes into frames, `Connection` is what the
owner can ask for. What several floors need is here: queueing frames, crediting windows, taking
streams off the books.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from . import frames, limits
from .control import Control, LocalSettings
from .errors import ErrorCode, StreamError
from .headers import NO_DYNAMIC_TABLE, FieldDecoder, HeaderBlock
from .interface import Owner, Role, StreamSink
from .output import Outbox, OutputPool
from .streams import Fate, Gone, State, Stream

if TYPE_CHECKING:
    from .connection import Connection
    from .limits import Clock
    from .request import ConnectRequest


class Endpoint:
    """State of one end of a connection. Public attributes are for reading only.

    `streams` holds the streams that are not closed, by id; `draining` is true from the first
    GOAWAY on, sent or received; `closed` when nothing can happen any more.
    """

    __slots__ = (
        "_block",
        "_consumed",
        "_control",
        "_current",
        "_decoder",
        "_drained_told",
        "_ends",
        "_gone",
        "_highest_opened",
        "_highest_peer",
        "_idle",
        "_last_accepted",
        "_leaving",
        "_left",
        "_max_frame",
        "_only",
        "_out",
        "_owner",
        "_pad_due",
        "_padding",
        "_peer_max_streams",
        "_peer_window",
        "_pings",
        "_preface_left",
        "_receive_window",
        "_send_window",
        "_settled",
        "_starved",
        "_table_dropped",
        "_tail",
        "_tail_wanted",
        "_tell_drained",
        "_wasted",
        "closed",
        "draining",
        "role",
        "settings",
        "streams",
    )

    def __init__(
        self,
        role: Role,
        owner: Owner,
        outputs: OutputPool,
        settings: LocalSettings,
        clock: Clock,
    ) -> None:
        self.role = role
        self.settings = settings
        self.streams: dict[int, Stream] = {}
        self.draining = self.closed = False
        # Payloads of ours that are not answered: one that the peer makes up is no answer.
        self._pings: list[bytes] = []
        self._owner = owner
        self._out = Outbox(outputs)
        self._control = Control(role, settings)
        self._decoder = FieldDecoder(settings.max_header_list)
        self._table_dropped = False
        self._wasted = limits.wasted_streams(clock)
        self._idle = limits.idle_frames(clock)
        self._init_streams()
        self._init_reading()

    def _init_streams(self) -> None:
        self._gone = Gone()
        # Streams whose `reserve` came back empty, in that order.
        self._starved: dict[Stream, None] = {}
        self._highest_opened = -1
        self._highest_peer = 0
        # What the peer allows us; the defaults hold until its SETTINGS (RFC 9113 section 6.5.2).
        self._settled = False
        self._peer_max_streams = 0
        self._peer_window = frames.DEFAULT_WINDOW
        self._max_frame = frames.DEFAULT_MAX_FRAME
        self._send_window = frames.DEFAULT_WINDOW
        # connection_window = _receive_window + _consumed + what streams have not credited.
        self._receive_window = self.settings.connection_window
        self._consumed = 0
        # The last stream our final GOAWAY accepts; None before.
        self._last_accepted: int | None = None
        self._leaving = self._tell_drained = self._drained_told = False

    def _init_reading(self) -> None:
        """Where `Receiver` is in the byte stream."""
        self._preface_left = len(frames.PREFACE) if self.role is Role.SERVER else 0
        # The only (type, stream id) that may come next, if there is such a rule.
        self._only: tuple[int, int] | None = (frames.SETTINGS, 0)
        self._block: HeaderBlock | None = None
        # A frame that was cut before it could be judged, and how many bytes it takes to go on.
        self._tail = bytearray()
        self._tail_wanted = 0
        # The DATA frame (or skipped frame) that is being received: bytes left, of which padding.
        self._left = self._padding = 0
        self._pad_due = self._ends = False
        self._current: Stream | None = None

    @property
    def open_count(self) -> int:
        """Streams that are not closed."""
        return len(self.streams)

    @property
    def pings_unanswered(self) -> int:
        """PINGs of `Connection.ping` that wait for their answer."""
        return len(self._pings)

    def _new_stream(
        self, stream_id: int, request: ConnectRequest, sink: StreamSink | None = None
    ) -> Stream:
        """An idle stream, on the books."""
        connection = cast("Connection", self)
        windows = (self._peer_window, self.settings.initial_window)
        stream = self.streams[stream_id] = Stream(connection, stream_id, request, windows, sink)
        return stream

    # Output

    def _put_control(self) -> None:
        """Queue what h2 has made."""
        raw = self._control.output()
        if raw:
            self._out.put(raw)

    def _put_headers(self, stream_id: int, block: bytes, *, end: bool) -> None:
        if not self._table_dropped:
            self._table_dropped = True
            block = NO_DYNAMIC_TABLE + block
        flags = frames.END_HEADERS | (frames.END_STREAM if end else 0)
        self._out.put(frames.frame(frames.HEADERS, flags, stream_id, block))

    def _wake(self) -> None:
        """Let starved streams try again, if there is a window and room for them."""
        if self._send_window <= 0 or not self._out.room():
            return
        for stream in [s for s in self._starved if s.send_window > 0]:
            if stream in self._starved:
                del self._starved[stream]
                stream.sink.writable()

    # Receive windows

    def _consume(self, stream: Stream, count: int) -> None:
        """The stream's receiver is done with `count` bytes: let the peer send as many."""
        consumed = stream.consumed = stream.consumed + count
        if consumed * 4 >= stream.full_window and stream.can_receive:
            more = self._fit_window(stream)
            if more > 0:
                self._out.put(frames.window_update(stream.id, more))
                stream.receive_window += more
                stream.consumed = 0
        self._consume_connection(count)

    def _fit_window(self, stream: Stream) -> int:
        """How much to open a stream's window by: alone on its tunnel it may have a large one.

        When others come, what it has is not taken away, but not given again either: so that a few
        apps that stop reading cannot fill the connection's window.
        """
        settings = self.settings
        window = settings.stream_window if len(self.streams) == 1 else settings.initial_window
        change = window - stream.full_window
        if change < 0:
            change = max(change, -stream.consumed)
            stream.consumed += change
        stream.full_window += change
        return stream.consumed + max(change, 0)

    def _consume_connection(self, count: int) -> None:
        """Open the connection's window alone: for bytes that no stream keeps."""
        self._consumed += count
        if self._consumed * 4 >= self.settings.connection_window and not self.closed:
            self._out.put(frames.window_update(0, self._consumed))
            self._receive_window += self._consumed
            self._consumed = 0

    # The end of streams

    def _forget(self, stream: Stream, fate: Fate) -> None:
        """Take a stream off the books."""
        del self.streams[stream.id]
        self._starved.pop(stream, None)
        self._gone.add(stream.id, fate)

    def _forget_if_closed(self, stream: Stream) -> None:
        """After an END_STREAM: perhaps it was the second one."""
        if stream.state is State.CLOSED and self.streams.get(stream.id) is stream:
            self._forget(stream, Fate.ENDED)
            self._check_drained()

    def _release(self, stream: Stream) -> None:
        """Credit what the stream's receiver will not: a lost credit stalls the whole tunnel."""
        count = stream.uncredited
        stream.receive_window, stream.consumed = stream.full_window, 0
        if count:
            self._consume_connection(count)

    def _kill(self, stream: Stream, fate: Fate) -> None:
        """End a stream without its receiver: reset by one side or the other."""
        stream.close()
        self._release(stream)
        self._forget(stream, fate)

    def _stream_error(self, stream: Stream, error: StreamError) -> None:
        """The peer broke the rules on this stream only."""
        self._out.put(frames.rst_stream(stream.id, error.code))
        self._kill(stream, Fate.RESET)
        stream.sink.reset(error.code)
        self._wasted.spend()

    # The end of the connection

    def _final_goaway(self) -> None:
        """Say which streams we still serve; later ones are refused."""
        self._last_accepted = self._highest_peer
        self._out.put(frames.goaway(self._highest_peer, ErrorCode.NO_ERROR))
        self._tell_drained = True
        self._check_drained()

    def _check_drained(self) -> None:
        done = self._tell_drained and not self.streams and self._out.empty
        if done and not self._drained_told and not self.closed:
            self._drained_told = True
            self._owner.drained()

    def _die(self, code: int) -> None:
        """No stream survives this, and none hears of it twice."""
        self.closed = True
        doomed = list(self.streams.values())
        self.streams.clear()
        self._starved.clear()
        for stream in doomed:
            stream.close()
        for stream in doomed:
            stream.sink.reset(code)
