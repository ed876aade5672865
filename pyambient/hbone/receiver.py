"""What the peer's bytes do to a connection.

General theory of operation
---------------------------
`receive` cuts the byte stream into frames. The common case, a DATA frame for an open stream that
lies in the buffer whole, is handled in the loop of `_parse` and makes one object, the view that
the stream's sink gets. All else takes the general way:

* DATA is judged by its header (`_begin_data`) and its payload passed on as it comes
  (`_continue_frame`), wherever the bytes are cut. Unknown frames are skipped the same way.
* Every other frame is handled whole. If it is cut, its bytes wait in `_tail`, but not before its
  header was judged, so `_tail` is bounded by the header list limit.

A mistake of the peer is a StreamError, which costs the stream, or a RemoteProtocolError, which
costs the connection: GOAWAY is queued, every sink is reset, and `receive` raises.

Sinks and the owner may call the connection back from inside all of this, so after every such call
the stream may be gone and the connection closed. The loop asks for `closed` on every turn, a
stream that dies under the DATA frame being received has `deliver` replaced.
"""

from __future__ import annotations

from . import frames
from .errors import ErrorCode, RemoteProtocolError, StreamError
from .frames import (
    DATA,
    END_STREAM,
    HEADER_SIZE,
    LAST_TYPE,
    MAX_31_BITS,
    PADDED,
    WINDOW_UPDATE,
    header_from,
    u32_from,
)
from .handlers import FrameHandlers
from .streams import Fate, Stream


class Receiver(FrameHandlers):
    """The receiving half of a connection."""

    __slots__ = ()

    def receive(self, view: memoryview) -> None:
        """Take bytes of the peer, cut anywhere; raise RemoteProtocolError after queueing GOAWAY.

        `view` is not kept. On a closed connection the bytes are ignored.
        """
        if self.closed:
            return
        try:
            self._take(view)
        except RemoteProtocolError as error:
            self._out.put(frames.goaway(self._highest_peer, error.code, error.text))
            self._die(error.code)
            raise

    # Cutting

    def _take(self, view: memoryview) -> None:
        if self._out.overflowing:
            raise RemoteProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, "the peer does not read our answers"
            )
        position = self._take_preface(view) if self._preface_left else 0
        if self._tail:
            position = self._complete_tail(view, position)
        self._parse(view, position)

    def _take_preface(self, view: memoryview) -> int:
        count = min(self._preface_left, len(view))
        self._control.preface(view[:count])
        self._preface_left -= count
        return count

    def _parse(self, view: memoryview, position: int) -> None:
        """Handle all frames in `view` from `position` on; keep what is cut off."""
        end = len(view)
        streams = self.streams
        max_length = self.settings.max_frame_accepted
        while position < end and not self.closed:
            if self._left:
                position = self._continue_frame(view, position)
                continue
            start, position = position, position + HEADER_SIZE
            if position > end:
                self._keep(view[start:], HEADER_SIZE)
                return
            high, low, kind, flags, stream_id = header_from(view, start)
            length = high << 8 | low
            stream_id &= MAX_31_BITS
            if self._only is not None or length > max_length:
                self._check_order_and_size(kind, stream_id, length)
            if kind != DATA:
                position = self._other_frame(view, start, kind, flags, stream_id, length)
                continue
            stream = streams.get(stream_id)
            after = position + length
            if (
                stream is None
                or after > end
                or not stream.can_receive
                or not 0 < length <= stream.receive_window
                or length > self._receive_window
                or flags & PADDED
            ):
                self._begin_data(stream_id, flags, length)
                continue
            stream.receive_window -= length
            self._receive_window -= length
            stream.deliver(view[position:after])
            if flags & END_STREAM:
                self._peer_ended(stream)
            position = after

    def _other_frame(
        self, view: memoryview, start: int, kind: int, flags: int, stream_id: int, length: int
    ) -> int:
        """Handle, skip or keep a frame that is not DATA; return where to go on."""
        position = start + HEADER_SIZE
        after = position + length
        if kind == WINDOW_UPDATE and length == 4 and after <= len(view):
            self._window_update(stream_id, u32_from(view, position)[0] & MAX_31_BITS)
        elif kind > LAST_TYPE:
            self._idle.spend()
            self._left = length
            return position
        else:
            self._judge(kind, flags, stream_id, length)
            if after > len(view):
                self._keep(view[start:], HEADER_SIZE + length)
                return len(view)
            self._handle(kind, flags, stream_id, view[position:after])
        return after

    def _check_order_and_size(self, kind: int, stream_id: int, length: int) -> None:
        if self._only is not None and self._only != (kind, stream_id):
            expected, on_stream = self._only
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"{frames.name(kind)} frame on stream {stream_id} where only"
                f" {frames.name(expected)} on stream {on_stream} may come",
            )
        if length > self.settings.max_frame_accepted:
            raise RemoteProtocolError(
                ErrorCode.FRAME_SIZE_ERROR, f"{frames.name(kind)} frame of {length} bytes"
            )

    def _keep(self, rest: memoryview, wanted: int) -> None:
        """Keep the beginning of a frame that is cut; go on when there are `wanted` bytes."""
        self._tail += rest
        self._tail_wanted = wanted

    def _complete_tail(self, view: memoryview, position: int) -> int:
        """Finish the frame that the last call cut; return where in `view` the next one starts."""
        tail = self._tail
        while tail and position < len(view):
            more = view[position : position + self._tail_wanted - len(tail)]
            tail += more
            position += len(more)
            if len(tail) == self._tail_wanted:
                whole = memoryview(bytes(tail))
                tail.clear()
                self._parse(whole, 0)
        return position

    def _judge(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Refuse a frame by its header, before it is waited for."""
        frames.check_header(kind, flags, stream_id, length)
        if kind in (frames.HEADERS, frames.CONTINUATION) and length > self.settings.max_header_list:
            raise RemoteProtocolError(
                ErrorCode.ENHANCE_YOUR_CALM, f"header block of {length} bytes"
            )

    def _handle(self, kind: int, flags: int, stream_id: int, payload: memoryview) -> None:
        try:
            self._handle_whole(kind, flags, stream_id, payload)
        except StreamError as error:
            self._stream_error(self.streams[stream_id], error)

    # DATA

    def _begin_data(self, stream_id: int, flags: int, length: int) -> None:
        """A DATA frame that needs thought, by its header; the payload follows."""
        if length > self._receive_window:
            raise RemoteProtocolError(
                ErrorCode.FLOW_CONTROL_ERROR, "the peer overran the connection's window"
            )
        if not length and not flags & END_STREAM:
            self._idle.spend()
        if not length and flags & PADDED:
            raise RemoteProtocolError(ErrorCode.FRAME_SIZE_ERROR, "padded DATA frame of 0 bytes")
        self._receive_window -= length
        stream = self._current = self._data_stream(stream_id, length)
        self._left = length
        self._pad_due = bool(flags & PADDED)
        if stream is None:
            # Nobody will consume these bytes: they are credited before they are skipped.
            self._consume_connection(length)
            return
        self._ends = bool(flags & END_STREAM)
        if not length:
            self._finish_data()

    def _data_stream(self, stream_id: int, length: int) -> Stream | None:
        """The stream that a DATA frame is for, charged with it; None to skip the frame."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(DATA, stream_id)
            if self._gone.fate(stream_id) is Fate.ENDED:
                raise RemoteProtocolError(
                    ErrorCode.STREAM_CLOSED, f"DATA on stream {stream_id} after its end"
                )
            return None
        try:
            stream.charge(length)
        except StreamError as error:
            self._stream_error(stream, error)
            return None
        return stream

    def _continue_frame(self, view: memoryview, position: int) -> int:
        """Pass on or skip what `view` has of the frame under way; return where that ends."""
        stream = self._current
        if self._pad_due:
            self._take_pad_length(stream, view[position])
            position += 1
        if self._left > self._padding:
            part = view[position : position + self._left - self._padding]
            self._left -= len(part)
            if stream is not None and part:
                stream.deliver(part)
        else:
            part = view[position : position + self._left]
            self._left = self._padding = self._left - len(part)
        if not self._left:
            self._finish_data()
        return position + len(part)

    def _take_pad_length(self, stream: Stream | None, padding: int) -> None:
        """Padding counts for the windows (RFC 9113 section 6.1), but no sink consumes it."""
        self._pad_due = False
        self._left -= 1
        if padding > self._left:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, "DATA frame with padding longer than the frame"
            )
        self._padding = padding
        if stream is not None and not stream.closed:
            self._consume(stream, 1 + padding)

    def _finish_data(self) -> None:
        """The frame under way is complete."""
        stream, self._current = self._current, None
        ends, self._ends = self._ends, False
        self._padding = 0
        if stream is not None and ends:
            self._peer_ended(stream)
