"""A relay between an app's socket and a stream of a tunnel.

General theory of operation
---------------------------
Up (app to tunnel): the app's bytes are received straight into the tunnel's output, behind the
header of a DATA frame. A block is as large as the windows, the frame size and the recent traffic
of this relay allow; after a full block the relay queues itself instead of reading on.

Down (tunnel to app): a DATA payload is a view of the shared receive buffer; it is sent at once,
and only what the socket did not take is copied into the backlog. Bytes are credited to the peer
when the app's socket took them, so a backlog is never larger than the stream's window.

Ends are kept apart and carried over: a FIN of the app is END_STREAM and the reverse; a reset of
the app is RST_STREAM and the reverse (SO_LINGER 0), because a truncated transfer must not look
complete (RFC 9113 section 8.5). The relay is finished when both directions have ended or one was
reset; `on_finished` is then called once, with the byte counts and the error in place.

The app's socket may still be connecting when the relay is made (server side): `connected()` opens
it. On the client side nothing is read from the app before the peer's answer, so that a refusal
reaches the app as a refusal.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from pyambient.hbone import HEADER_SIZE, ErrorCode, Headers, Stream

from .farewell import reset_on_close
from .loop import ALL_APP_EVENTS, APP_EVENTS, BEYOND, IN, OUT, Loop
from .reservoir import Reservoir
from .tunnel import Tunnel

_READ_MIN = 4 << 10
# With the frame's header a block is exactly sixteen full TLS records.
_READ_MAX = (256 << 10) - HEADER_SIZE
_READ_SCARCE = 16 << 10


def reset(sock: socket.socket) -> None:
    """Close so that the other side sees a reset, not an end."""
    try:
        reset_on_close(sock)
    finally:
        sock.close()


class StreamRelay:
    """App socket and stream, joined; see the top of this file. It is the stream's sink."""

    __slots__ = (
        "_app_ended",
        "_backlog",
        "_exhaust",
        "_fd",
        "_loop",
        "_open",
        "_peer_ended",
        "_queued",
        "_readable",
        "_want",
        "_watching_out",
        "bytes_down",
        "bytes_up",
        "error",
        "on_answer",
        "on_finished",
        "reservoir",
        "sock",
        "stream",
        "tunnel",
    )

    def __init__(self, loop: Loop, sock: socket.socket, tunnel: Tunnel) -> None:
        """Take over `sock`, non-blocking; set `stream` before anything can arrive for it."""
        self.sock = sock
        self.tunnel = tunnel
        self.stream: Stream | None = None
        self.bytes_up = 0
        self.bytes_down = 0
        self.error: str | None = None
        self.on_answer: Callable[[StreamRelay, int, Headers], None] | None = None
        self.on_finished: Callable[[StreamRelay], None] | None = None
        self.reservoir: Reservoir | None = None
        self._loop = loop
        self._fd = sock.fileno()
        self._open = False
        self._readable = self._exhaust = self._queued = False
        self._app_ended = self._peer_ended = self._watching_out = False
        self._backlog: bytearray | None = None
        self._want = _READ_MIN

    @property
    def finished(self) -> bool:
        return self._fd < 0

    def watch(self) -> None:
        """Let the loop tell of the app's socket."""
        self._loop.watch(self._fd, self.on_events, APP_EVENTS)

    def open(self) -> None:
        """Both ends are there: bytes may flow."""
        self._open = True
        if self._backlog is not None:
            self._drain()
        if self._readable and not self.finished:
            self.pump()

    def on_events(self, mask: int) -> None:
        if mask == IN and self._open:
            self._readable = True
            self.pump()
            return
        if mask & OUT and self._backlog is not None and self._open:
            self._drain()
        if mask & (IN | BEYOND):
            self._readable = True
            if mask & BEYOND:
                self._exhaust = True
            if self._fd >= 0:
                if self._open:
                    self.pump()
                elif self._exhaust:
                    self._check_gone()

    def _check_gone(self) -> None:
        """The app reset its connection before the answer came: give the stream up.

        A FIN is no reason to: a client may send its request and half-close at once.
        """
        code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.abort("client disconnected before the tunnel was up")

    def resume(self) -> None:
        """The loop's or the tunnel's call to go on reading the app."""
        self._queued = False
        if self._fd >= 0 and self._open and self._readable:
            self.pump()

    def _requeue(self) -> None:
        if not self._queued:
            self._queued = True
            self._loop.call_soon(self.resume)

    def pump(self) -> None:
        """Read one block of the app into the tunnel's output."""
        tunnel, stream = self.tunnel, self.stream
        if self._app_ended or stream is None:
            return
        if tunnel.blocked:
            tunnel.park(self)
            return
        view = tunnel.connection.reserve(stream, self._want)
        if view:
            self._read_block(stream, view)
        else:
            # The stream's `writable` will come: from the peer's window, or from what is sent now.
            self._loop.flush_soon(tunnel)

    def _read_block(self, stream: Stream, view: memoryview) -> None:
        try:
            count = self.sock.recv_into(view)
        except BlockingIOError:
            self._readable = False
            return
        except OSError as error:
            self.abort(f"receive: {error.strerror}")
            return
        if not count:
            self._app_end()
            return
        self.tunnel.connection.commit(stream, count)
        self.bytes_up += count
        if count == len(view):
            self._after_full_block()
            return
        self._loop.flush_soon(self.tunnel)
        if self._exhaust:
            self._requeue()
        else:
            self._readable = False
            if self._want > _READ_MIN:
                self._want //= 2

    def _after_full_block(self) -> None:
        """There may be more: a larger block and another turn."""
        self._want = min(self._want * 4, _READ_SCARCE if self.tunnel.scarce else _READ_MAX)
        self.tunnel.flush_if_full()
        self._requeue()

    def _app_end(self) -> None:
        self._app_ended = True
        if self.stream is not None:
            self.tunnel.connection.end(self.stream)
            self._loop.flush_soon(self.tunnel)
        self._finish_if_done()

    # What the stream tells (hbone.StreamSink)

    def answered(self, status: int, headers: Headers) -> None:
        if self.on_answer is not None:
            self.on_answer(self, status, headers)

    def data(self, view: memoryview) -> None:
        """Send the payload to the app; keep what its socket does not take."""
        backlog = self._backlog
        if backlog is not None or not self._open:
            self._keep(view)
            return
        try:
            count = self.sock.send(view)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self._credit(len(view))
            self.abort(f"send: {error.strerror}")
            return
        self.bytes_down += count
        self._credit(count)
        if count < len(view) and self._fd >= 0:
            self._keep(view[count:])
            self._watch_out()

    def _keep(self, rest: memoryview) -> None:
        """What the app has not taken waits, as far as its pod may keep so much."""
        if self.reservoir is not None and not self.reservoir.take(len(rest)):
            self.abort("too much is kept for apps that do not read", ErrorCode.ENHANCE_YOUR_CALM)
        elif self._backlog is None:
            self._backlog = bytearray(rest)
        else:
            self._backlog += rest

    def _watch_out(self) -> None:
        """The app's socket is full: from now on it tells when it is not."""
        if not self._watching_out and self._fd >= 0:
            self._watching_out = True
            self._loop.rewatch(self._fd, ALL_APP_EVENTS)

    def ended(self) -> None:
        self._peer_ended = True
        if self._backlog is None and self._open:
            self._app_shutdown()

    def reset(self, code: int) -> None:
        """The peer gave the stream up, or the tunnel is gone."""
        if self._fd < 0:
            return
        self.stream = None
        if code == ErrorCode.NO_ERROR and self._peer_ended:
            self._app_ended = True
            if self._backlog is None:
                self._finish(graceful=True)
            return
        self.error = self.error or self._reset_reason(code)
        self._finish(graceful=False)

    def _reset_reason(self, code: int) -> str:
        if self.tunnel.is_closed:
            return self.tunnel.reason
        try:
            return f"stream reset by the peer: {ErrorCode(code).name}"
        except ValueError:
            return f"stream reset by the peer: code {code}"

    def writable(self) -> None:
        if self._readable and self._open:
            self._requeue()

    # The app's side of the way down

    def _drain(self) -> None:
        backlog = self._backlog
        if not backlog:
            self._backlog = None
        else:
            try:
                count = self.sock.send(backlog)
            except BlockingIOError:
                self._watch_out()
                return
            except OSError as error:
                self.abort(f"send: {error.strerror}")
                return
            if self.reservoir is not None:
                self.reservoir.give(count)
            if count == len(backlog):
                self._backlog = None
            else:
                del backlog[:count]
                self._watch_out()
            self._took(count)
        if self._backlog is None and self._peer_ended:
            self._app_shutdown()

    def _took(self, count: int) -> None:
        self.bytes_down += count
        self._credit(count)

    def _credit(self, count: int) -> None:
        if count and self.stream is not None and self.tunnel.connection.credit(self.stream, count):
            self._loop.flush_soon(self.tunnel)

    def _app_shutdown(self) -> None:
        """Everything from the peer is with the app: end that direction."""
        if self._app_ended:
            self._finish(graceful=True)
            return
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.abort(f"send: {error.strerror}")
            return

    # Ends

    def _finish_if_done(self) -> None:
        if self._app_ended and self._peer_ended and self._backlog is None:
            self._finish(graceful=True)

    def abort(self, error: str, code: int = ErrorCode.CONNECT_ERROR) -> None:
        """Give up: the peer's stream and the app's socket both see a reset."""
        if self._fd < 0:
            return
        self.error = self.error or error
        stream, self.stream = self.stream, None
        if stream is not None and not self.tunnel.is_closed:
            if self._backlog:
                self.tunnel.connection.credit(stream, len(self._backlog))
            self.tunnel.connection.reset(stream, code)
            self._loop.flush_soon(self.tunnel)
        self._finish(graceful=False)

    def crashed(self, error: BaseException) -> None:
        """A handler of this relay raised: end it, spare the tunnel."""
        self.abort(f"internal error: {error!r}", ErrorCode.INTERNAL_ERROR)

    def _finish(self, *, graceful: bool) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        self._loop.forget(fd)
        if self._backlog and self.reservoir is not None:
            self.reservoir.give(len(self._backlog))
        self._backlog = None
        if graceful:
            self.sock.close()
        else:
            reset(self.sock)
        finished, self.on_finished = self.on_finished, None
        # Nothing refers back to whoever is done with us: memory is free without a collection.
        self.stream = self.on_answer = None
        if finished is not None:
            finished(self)

    def __repr__(self) -> str:
        state = "finished" if self.finished else "open" if self._open else "opening"
        return f"<StreamRelay {state}, {self.bytes_up} bytes up, {self.bytes_down} down>"
