"""What each kind of frame of the peer does, DATA apart: one method per type.

The methods get whole frames, judged by `frames.check_header` already. A StreamError that one of
them raises costs the stream it is for, a RemoteProtocolError the connection.
"""

from __future__ import annotations

from typing import Final

from . import frames
from .endpoint import Endpoint
from .errors import ErrorCode, RemoteProtocolError, StreamError
from .frames import END_STREAM, MAX_31_BITS, WINDOW_UPDATE, u32_from
from .headers import Fields, HeaderBlock, encode_answer
from .interface import Role
from .request import check_trailers, parse_answer, parse_request
from .streams import Fate, Input, Stream

# Told apart from the owner's PINGs: its answer shows that the peer has seen our first GOAWAY.
DRAIN_PING: Final = b"goneaway"


class FrameHandlers(Endpoint):
    """An endpoint that knows what frames mean."""

    __slots__ = ()

    def _peer_ended(self, stream: Stream) -> None:
        if stream.closed:
            return
        stream.process(Input.RECV_END)
        stream.sink.ended()
        self._forget_if_closed(stream)

    # HEADERS and CONTINUATION

    def _headers(self, flags: int, stream_id: int, payload: memoryview) -> None:
        """A HEADERS frame (RFC 9113 section 6.2)."""
        self._check_headers_allowed(stream_id)
        with_end = bool(flags & END_STREAM)
        fragment = frames.header_fragment(flags, payload)
        if flags & frames.END_HEADERS and len(fragment) <= self.settings.max_header_list:
            self._block_complete(stream_id, bytes(fragment), with_end=with_end)
            return
        block = HeaderBlock(stream_id, self.settings.max_header_list, with_end=with_end)
        block.add(fragment)
        self._next_of_block(block, flags)

    def _continuation(self, flags: int, stream_id: int, payload: memoryview) -> None:
        """A CONTINUATION frame (section 6.10); `_only` keeps all others out of a block."""
        block = self._block
        if block is None:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"CONTINUATION on stream {stream_id} without HEADERS"
            )
        block.add(payload)
        self._next_of_block(block, flags)

    def _next_of_block(self, block: HeaderBlock, flags: int) -> None:
        if flags & frames.END_HEADERS:
            self._block = self._only = None
            self._block_complete(block.stream_id, bytes(block.fragments), with_end=block.with_end)
        else:
            self._block = block
            self._only = (frames.CONTINUATION, block.stream_id)

    def _check_headers_allowed(self, stream_id: int) -> None:
        """Only clients open streams, with odd and rising ids (RFC 9113 section 5.1.1)."""
        if stream_id in self.streams:
            return
        opens = self.role is Role.SERVER and stream_id > self._highest_peer
        if opens and stream_id % 2:
            return
        self._check_known(frames.HEADERS, stream_id)
        fate = self._gone.fate(stream_id)
        if fate is Fate.ENDED:
            raise RemoteProtocolError(
                ErrorCode.STREAM_CLOSED, f"HEADERS on stream {stream_id} after its end"
            )
        if fate is None and self.role is Role.SERVER:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} opened below another"
            )

    def _block_complete(self, stream_id: int, block: bytes, *, with_end: bool) -> None:
        """Decode, in any case: HPACK's state is the connection's, not the stream's."""
        fields = self._decoder.decode(block)
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._headers_of(stream, fields, with_end=with_end)
        elif self.role is Role.SERVER and stream_id > self._highest_peer:
            self._opened(stream_id, fields, with_end=with_end)

    def _headers_of(self, stream: Stream, fields: Fields, *, with_end: bool) -> None:
        """Headers on a stream that exists: an answer or trailers."""
        if self.role is Role.CLIENT and stream.unanswered:
            self._answer(stream, fields, with_end=with_end)
            return
        stream.process(Input.RECV_HEADERS)
        check_trailers(fields)
        if not with_end:
            raise StreamError(ErrorCode.PROTOCOL_ERROR, "second HEADERS without END_STREAM")
        self._peer_ended(stream)

    def _answer(self, stream: Stream, fields: Fields, *, with_end: bool) -> None:
        """Client: the answer to a CONNECT, or an informational one before it."""
        status, headers = parse_answer(fields)
        if status < 200:
            if with_end:
                raise StreamError(ErrorCode.PROTOCOL_ERROR, "informational answer at the end")
            self._idle.spend()
            return
        stream.process(Input.RECV_HEADERS)
        stream.sink.answered(status, headers)
        if with_end:
            self._peer_ended(stream)

    def _opened(self, stream_id: int, fields: Fields, *, with_end: bool) -> None:
        """Server: a request on its own new stream."""
        self._highest_peer = stream_id
        last = self._last_accepted
        full = len(self.streams) >= self.settings.max_streams_accepted
        if full or (last is not None and stream_id > last):
            self._out.put(frames.rst_stream(stream_id, ErrorCode.REFUSED_STREAM))
            self._gone.add(stream_id, Fate.RESET)
            self._wasted.spend()
            return
        try:
            request = parse_request(fields)
        except StreamError as error:
            self._refuse_malformed(stream_id, error.text, with_end=with_end)
            return
        stream = self._new_stream(stream_id, request)
        stream.process(Input.RECV_HEADERS)
        self._owner.requested(stream, request)
        if with_end:
            self._peer_ended(stream)

    def _refuse_malformed(self, stream_id: int, why: str, *, with_end: bool) -> None:
        """Answer 400 to what is no CONNECT; there never is a stream."""
        self._put_headers(stream_id, encode_answer(400, ()), end=True)
        if not with_end:
            self._out.put(frames.rst_stream(stream_id, ErrorCode.NO_ERROR))
        self._gone.add(stream_id, Fate.ENDED if with_end else Fate.RESET)
        self._owner.refused(stream_id, 400, why)
        self._wasted.spend()

    # The other frames

    def _check_known(self, kind: int, stream_id: int) -> None:
        """RFC 9113 section 5.1: an idle stream gets no frame but HEADERS and PRIORITY."""
        ours = self.role is Role.CLIENT
        highest = self._highest_opened if ours else self._highest_peer
        if stream_id % 2 == 0 or stream_id > highest:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"{frames.name(kind)} frame on stream {stream_id}, which is idle",
            )

    def _priority(self, _flags: int, _stream_id: int, _payload: memoryview) -> None:
        """Deprecated (RFC 9113 section 5.3.2) and of no use to tunnels."""
        self._idle.spend()

    def _rst_stream(self, _flags: int, stream_id: int, payload: memoryview) -> None:
        """RST_STREAM (section 6.4), harmless on a stream that has ended: Envoy sends it there."""
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(frames.RST_STREAM, stream_id)
            self._gone.note_end(stream_id)
            return
        wasted = self.role is Role.SERVER and stream.unanswered
        self._kill(stream, Fate.ENDED)
        stream.sink.reset(u32_from(payload)[0])
        self._check_drained()
        if wasted:
            self._wasted.spend()

    def _settings(self, flags: int, _stream_id: int, payload: memoryview) -> None:
        """SETTINGS (section 6.5): h2 judges and acknowledges, we apply."""
        self._idle.spend()
        if not self._settled and flags & frames.ACK:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, "SETTINGS acknowledged before any were sent"
            )
        self._control.settings(flags, payload)
        self._put_control()
        if not flags & frames.ACK:
            self._apply_settings()

    def _apply_settings(self) -> None:
        peer = self._control.peer
        self._max_frame = min(peer.max_frame_size, self.settings.max_frame_sent)
        self._peer_max_streams = peer.max_concurrent_streams
        change = peer.initial_window_size - self._peer_window
        self._peer_window = peer.initial_window_size
        for stream in self.streams.values():
            try:
                stream.change_window(change)
            except StreamError as error:
                # RFC 9113 section 6.9.2 makes this one a connection error.
                raise RemoteProtocolError(error.code, error.text) from None
        if not self._settled:
            self._settled = True
            self._only = None
            self._owner.settled()
        self._wake()

    def _push_promise(self, _flags: int, stream_id: int, _payload: memoryview) -> None:
        """PUSH_PROMISE (section 6.6) needs a leave that our SETTINGS do not give."""
        raise RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, f"PUSH_PROMISE on stream {stream_id}")

    def _ping(self, flags: int, _stream_id: int, payload: memoryview) -> None:
        """PING (section 6.7): h2 answers; an answer shows that the peer is alive."""
        self._idle.spend()
        answered = self._control.pinged(flags, payload)
        self._put_control()
        if answered is None:
            return
        if answered in self._pings:
            del self._pings[: self._pings.index(answered) + 1]
        if answered == DRAIN_PING and self._leaving and self._last_accepted is None:
            self._final_goaway()

    def _goaway(self, _flags: int, _stream_id: int, payload: memoryview) -> None:
        """GOAWAY (section 6.8): our streams above its last one were never looked at."""
        self._idle.spend()
        last_stream_id, code = frames.parse_goaway(payload)
        self.draining = True
        unserved = [s for s in self.streams.values() if s.id > last_stream_id]
        for stream in unserved if self.role is Role.CLIENT else ():
            if not stream.closed:
                self._kill(stream, Fate.RESET)
                stream.sink.reset(ErrorCode.REFUSED_STREAM)
        self._owner.goaway(code)
        self._tell_drained = True
        self._check_drained()

    def _window_update(self, stream_id: int, increment: int) -> None:
        """WINDOW_UPDATE (section 6.9)."""
        if stream_id == 0:
            self._connection_window_update(increment)
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(WINDOW_UPDATE, stream_id)
            return
        try:
            stream.window_update(increment)
        except StreamError as error:
            self._stream_error(stream, error)
            return
        if stream in self._starved:
            self._wake()

    def _connection_window_update(self, increment: int) -> None:
        window = self._send_window + increment
        if not increment:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE by 0 on the connection"
            )
        if window > MAX_31_BITS:
            raise RemoteProtocolError(
                ErrorCode.FLOW_CONTROL_ERROR, f"connection window of {window}"
            )
        self._send_window = window
        if self._starved:
            self._wake()

    def _handle_whole(self, kind: int, flags: int, stream_id: int, payload: memoryview) -> None:
        """A frame of any kind but DATA and WINDOW_UPDATE; unknown ones do not come here."""
        match kind:
            case frames.HEADERS:
                self._headers(flags, stream_id, payload)
            case frames.RST_STREAM:
                self._rst_stream(flags, stream_id, payload)
            case frames.PING:
                self._ping(flags, stream_id, payload)
            case frames.SETTINGS:
                self._settings(flags, stream_id, payload)
            case frames.GOAWAY:
                self._goaway(flags, stream_id, payload)
            case frames.CONTINUATION:
                self._continuation(flags, stream_id, payload)
            case frames.PRIORITY:
                self._priority(flags, stream_id, payload)
            case frames.PUSH_PROMISE:
                self._push_promise(flags, stream_id, payload)
