"""A relay between two plain TCP sockets: passthrough, and plaintext inbound.

Each direction receives into one shared buffer and sends at once; what the other socket does not
take is kept (at most one buffer) and that direction is not read until it has gone. Ends are
carried over as in `relay`: FIN as FIN, reset as reset.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from .loop import ALL_APP_EVENTS as APP_EVENTS
from .loop import GONE, IN, OUT, Loop
from .relay import reset
from .tls import SharedBuffers


class _Half:
    """One socket of the pair, and what it still owes to the other."""

    __slots__ = (
        "backlog",
        "bytes",
        "ended",
        "fd",
        "hung_up",
        "other",
        "queued",
        "readable",
        "sock",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.other: _Half = self
        self.backlog: memoryview | None = None
        self.bytes = 0
        self.ended = self.readable = self.hung_up = self.queued = False


class PlainRelay:
    """Two sockets, joined. `near` is the one that was accepted."""

    def __init__(
        self, loop: Loop, near: socket.socket, far: socket.socket, buffers: SharedBuffers
    ) -> None:
        """Take over both sockets, non-blocking and connected; `start()` begins."""
        self.error: str | None = None
        self.on_finished: Callable[[PlainRelay], None] | None = None
        self._loop = loop
        self._view = buffers.plain_view
        self._near, self._far = _Half(near), _Half(far)
        self._near.other, self._far.other = self._far, self._near
        self._finished = False

    @property
    def finished(self) -> bool:
        return self._finished

    @property
    def bytes_from_near(self) -> int:
        return self._near.bytes

    @property
    def bytes_from_far(self) -> int:
        return self._far.bytes

    def start(self) -> None:
        self._loop.watch(self._near.fd, self._near_events, APP_EVENTS)
        self._loop.watch(self._far.fd, self._far_events, APP_EVENTS)

    def _near_events(self, mask: int) -> None:
        self._events(self._near, mask)

    def _far_events(self, mask: int) -> None:
        self._events(self._far, mask)

    def _events(self, half: _Half, mask: int) -> None:
        if self._finished:
            return
        if mask & OUT and half.other.backlog is not None:
            self._drain(half.other)
        if mask & (IN | GONE) and not self._finished:
            half.readable = True
            half.hung_up = half.hung_up or bool(mask & GONE)
            self._pump(half)

    def _pump(self, half: _Half) -> None:
        """Move bytes from `half` to its other: one buffer, or until nothing is there."""
        if half.ended or half.backlog is not None:
            return
        try:
            count = half.sock.recv_into(self._view)
        except BlockingIOError:
            half.readable = False
            return
        except OSError as error:
            self.abort(f"receive: {error.strerror}")
            return
        if not count:
            half.ended = True
            self._pass_end(half)
            return
        half.bytes += count
        if not self._send(half, self._view[:count]):
            return
        if count == len(self._view) or half.hung_up:
            self._requeue(half)
        else:
            half.readable = False

    def _send(self, half: _Half, view: memoryview) -> bool:
        """Send to the other side; False if not all of it went."""
        try:
            count = half.other.sock.send(view)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self.abort(f"send: {error.strerror}")
            return False
        if count == len(view):
            half.backlog = None
            return True
        rest = view[count:]
        half.backlog = rest if half.backlog is not None else memoryview(bytes(rest))
        return False

    def _drain(self, half: _Half) -> None:
        if half.backlog is None or not self._send(half, half.backlog):
            return
        if half.ended:
            self._pass_end(half)
        elif half.readable:
            self._requeue(half)

    def _requeue(self, half: _Half) -> None:
        if half.queued:
            return
        half.queued = True
        self._loop.call_soon(self._resume_near if half is self._near else self._resume_far)

    def _resume_near(self) -> None:
        self._resume(self._near)

    def _resume_far(self) -> None:
        self._resume(self._far)

    def _resume(self, half: _Half) -> None:
        half.queued = False
        if not self._finished and half.readable:
            self._pump(half)

    def _pass_end(self, half: _Half) -> None:
        """`half` said FIN and all its bytes are delivered: say FIN to the other side."""
        try:
            half.other.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.abort(f"send: {error.strerror}")
            return
        if half.other.ended and half.other.backlog is None:
            self._finish(graceful=True)

    def abort(self, error: str) -> None:
        """Give up: both sides see a reset."""
        self.error = self.error or error
        self._finish(graceful=False)

    def crashed(self, error: BaseException) -> None:
        self.abort(f"internal error: {error!r}")

    def _finish(self, *, graceful: bool) -> None:
        if self._finished:
            return
        self._finished = True
        for half in (self._near, self._far):
            self._loop.forget(half.fd)
            half.backlog = None
            if graceful:
                half.sock.close()
            else:
                reset(half.sock)
        finished, self.on_finished = self.on_finished, None
        # The halves refer to one another: memory is free without a collection.
        self._near.other, self._far.other = self._near, self._far
        if finished is not None:
            finished(self)

    def __repr__(self) -> str:
        state = "finished" if self._finished else "open"
        return f"<PlainRelay {state}, {self._near.bytes} bytes out, {self._far.bytes} back>"
