"""One end of an HBONE connection, without I/O.

General theory of operation
---------------------------
Bytes from the transport go into `receive`, bytes for it come out of `pending`; in between, the
peer's doings are calls to the `Owner` (requests, GOAWAY) and to each stream's `StreamSink`, and
ours are the methods below. HTTP/2 is divided: hyper-h2 keeps the preface, SETTINGS and PING
(`control`), because that is fiddly and rare; streams, header blocks, DATA, the windows and GOAWAY
are here, because h2 would copy every byte several times and scan all streams on every open.

Sending: `reserve` hands out a view of the output behind the place of a frame header, the caller
receives from its app right into it, `commit` makes a DATA frame of what came. When a window is
closed or the output is full the view is empty, and the sink's `writable` is called once it may be
tried again. Frames leave in the order of the calls, whatever their kind.

Receiving: a sink gets views of the caller's receive buffer and returns their size by `credit` when
its app has taken them; only then may the peer send as much again. Every received byte is credited
once: by `credit`, or by the connection itself for padding, for frames of dead streams, and for
what a reset stream still held. So one stuck app stalls its stream, never the tunnel.

Streams die under their users at any time. Therefore every method that takes a stream does nothing
on a closed one; LocalProtocolError is for what was wrong from the start, as a second `end`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from . import frames
from .control import LocalSettings
from .errors import ErrorCode, LocalProtocolError
from .handlers import DRAIN_PING
from .headers import Headers, encode_answer
from .interface import Owner, Role, StreamSink
from .output import OutputPool
from .receiver import Receiver
from .request import ConnectRequest
from .streams import Fate, Input, Stream

if TYPE_CHECKING:
    from .limits import Clock

_NO_ROOM = memoryview(b"")
_DEFAULT_SETTINGS = LocalSettings()


class Connection(Receiver):
    """One end of an HBONE connection; see the top of this file."""

    __slots__ = ()

    def __init__(
        self,
        role: Role,
        owner: Owner,
        outputs: OutputPool,
        settings: LocalSettings = _DEFAULT_SETTINGS,
        clock: Clock = time.monotonic,
    ) -> None:
        """`clock` tells seconds; it is read only to count what a peer wastes."""
        super().__init__(role, owner, outputs, settings, clock)

    def start(self) -> None:
        """Queue our preface: SETTINGS, and the window of the whole connection."""
        self._control.start()
        self._put_control()
        more = self.settings.connection_window - frames.DEFAULT_WINDOW
        if more > 0:
            self._out.put(frames.window_update(0, more))

    def eof(self) -> None:
        """The peer's transport has ended: whatever is open is cut off."""
        self.connection_lost(ErrorCode.CONNECT_ERROR)

    def connection_lost(self, code: int) -> None:
        """The transport is gone: reset every sink that has not heard of it, forget all output."""
        if not self.closed:
            self._die(code)
        self._out.drop()

    # Output

    @property
    def pending_count(self) -> int:
        """How many bytes `pending` has."""
        return self._out.count

    @property
    def kept(self) -> int:
        """How much memory what is not sent takes."""
        return self._out.kept

    @property
    def pending(self) -> memoryview:
        """Bytes to send now, perhaps none; valid until the connection is used again.

        When they are all sent there may be more.
        """
        return self._out.pending()

    def sent(self, count: int) -> None:
        """`count` bytes of `pending` were taken."""
        self._out.sent(count)
        if self._starved:
            self._wake()
        self._check_drained()

    # Client

    def can_open(self) -> bool:
        """Whether `open` may be called now."""
        limit = min(self._peer_max_streams, self.settings.max_streams_opened)
        return (
            len(self.streams) < limit
            and not self.draining
            and not self.closed
            and not self._out.spilled
            and self._highest_opened + 2 <= frames.MAX_31_BITS
        )

    def open(self, request: ConnectRequest, sink: StreamSink) -> Stream:
        """Send a CONNECT; `sink.answered` tells the answer. Check `can_open` before."""
        if self.role is not Role.CLIENT or not self.can_open():
            raise LocalProtocolError(f"no stream can be opened on {self!r}")
        block = request.encode()
        if len(block) >= frames.DEFAULT_MAX_FRAME:
            raise LocalProtocolError(f"CONNECT of {len(block)} bytes of headers")
        self._highest_opened += 2
        stream = self._new_stream(self._highest_opened, request, sink)
        stream.process(Input.SEND_HEADERS)
        self._put_headers(stream.id, block, end=False)
        return stream

    # Server

    def accept(self, stream: Stream, headers: Headers = ()) -> None:
        """Answer 200: the tunnel is open."""
        if stream.closed:
            return
        block = encode_answer(200, headers)
        if len(block) >= frames.DEFAULT_MAX_FRAME:
            raise LocalProtocolError(f"answer of {len(block)} bytes of headers")
        stream.process(Input.SEND_HEADERS)
        self._put_headers(stream.id, block, end=False)

    def refuse(self, stream: Stream, status: int) -> None:
        """Answer `status` and end the stream; its sink hears nothing more."""
        if stream.closed:
            return
        stream.process(Input.SEND_HEADERS)
        self._put_headers(stream.id, encode_answer(status, ()), end=True)
        if stream.can_receive:
            # The answer is complete without the peer's end (RFC 9113 section 8.1).
            self._out.put(frames.rst_stream(stream.id, ErrorCode.NO_ERROR))
            self._kill(stream, Fate.RESET)
        else:
            self._kill(stream, Fate.ENDED)

    # Data

    def reserve(self, stream: Stream, want: int) -> memoryview:
        """Where to put up to `want` bytes of payload; `commit` them before anything else.

        Empty if a window is closed or the output is full (`writable` will be called), if the
        stream is not open for sending, or if `want` is 0.
        """
        if not stream.can_send:
            return _NO_ROOM
        length = self._out.room()
        length = min(length, want)
        length = min(length, stream.send_window)
        length = min(length, self._send_window)
        length = min(length, self._max_frame)
        if length <= 0:
            if want > 0:
                self._starved[stream] = None
            return _NO_ROOM
        return self._out.slot(length)

    def commit(self, stream: Stream, count: int) -> None:
        """The view that `reserve` returned last has `count` (> 0) bytes: send them."""
        self._out.commit(stream.id, count)
        stream.send_window -= count
        self._send_window -= count

    def end(self, stream: Stream) -> None:
        """Send END_STREAM: our direction is complete."""
        if stream.closed:
            return
        stream.process(Input.SEND_END)
        self._out.put(frames.frame(frames.DATA, frames.END_STREAM, stream.id))
        self._starved.pop(stream, None)
        self._forget_if_closed(stream)

    def reset(self, stream: Stream, code: int) -> None:
        """Give the stream up; its sink hears nothing more.

        A ztunnel reads NO_ERROR and CANCEL as an end: use another code where bytes are missing.
        What the sink has not credited is credited, also on a stream that has ended before.
        """
        if stream.closed:
            self._release(stream)
            return
        self._out.put(frames.rst_stream(stream.id, code))
        self._kill(stream, Fate.RESET)

    def credit(self, stream: Stream, count: int) -> bool:
        """The receiver has consumed `count` bytes of payload: the peer may send as many.

        Whether that has made something to send.
        """
        consumed, full = stream.consumed + count, stream.full_window
        if consumed * 4 < full and stream.receive_window + consumed <= full:
            of_all = self._consumed + count
            if of_all * 4 < self.settings.connection_window:
                # Mostly there is nothing to do but to count.
                stream.consumed, self._consumed = consumed, of_all
                return False
        uncredited = stream.uncredited
        if count > uncredited:
            if not stream.closed:
                raise LocalProtocolError(f"credit of {count} bytes, {uncredited} were received")
            count = uncredited
        if count > 0:
            self._consume(stream, count)
        return not self._out.empty

    # The connection as a whole

    def ping(self, payload: bytes) -> None:
        """Send a PING of eight bytes that nobody can guess; an answer is for all before it.

        `pings_unanswered` counts those that wait for one.
        """
        if self.closed:
            return
        self._control.ping(payload)
        self._put_control()
        self._pings.append(payload)

    def go_away(self) -> None:
        """Drain: the peer opens no more streams here, those that exist go on.

        A server first says GOAWAY with the highest id and a PING; only when that is answered does
        it name the last stream, so that none under way is lost (RFC 9113 section 6.8).
        """
        if self.closed or self._leaving:
            return
        self.draining = self._leaving = True
        if self.role is Role.CLIENT:
            self._final_goaway()
            return
        self._out.put(frames.goaway(frames.MAX_31_BITS, ErrorCode.NO_ERROR))
        self._control.ping(DRAIN_PING)
        self._put_control()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "draining" if self.draining else "open"
        return (
            f"<Connection {self.role.value} {state}, {len(self.streams)} streams,"
            f" window {self._send_window}>"
        )
