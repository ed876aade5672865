"""A relay between two plain TCP sockets: passthrough, and plaintext inbound.

Each direction receives into one shared buffer and sends at once; what the other socket does not
take is kept (at most one buffer) and that direction is not read until it has gone. Bulk is spliced
through a pipe instead, for half the CPU (`splicing`), and what stands there is as a backlog is:
first it has to go. Ends are carried over as in `relay`: FIN as FIN, reset as reset.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from .loop import ALL_APP_EVENTS as APP_EVENTS
from .loop import BEYOND, IN, OUT, Loop
from .relay import reset
from .reservoir import Reservoir
from .splicing import Pipe, Splicer
from .tls import SharedBuffers


class _Half:
    """One socket of the pair, and what it still owes to the other."""

    __slots__ = (
        "backlog",
        "bulk",
        "bytes",
        "ended",
        "exhaust",
        "fd",
        "kept",
        "other",
        "pipe",
        "queued",
        "readable",
        "sock",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.other: _Half = self
        self.backlog: memoryview | None = None
        self.pipe: Pipe | None = None
        self.bytes = self.kept = 0
        self.ended = self.readable = self.exhaust = self.queued = False
        # The next block had better be spliced.
        self.bulk = False

    @property
    def owing(self) -> bool:
        """Something that was read of it is not with the other one."""
        return self.backlog is not None or self.pipe is not None


class PlainRelay:
    """Two sockets, joined. `near` is the one that was accepted."""

    def __init__(
        self,
        loop: Loop,
        near: socket.socket,
        far: socket.socket,
        buffers: SharedBuffers,
        splicer: Splicer | None = None,
    ) -> None:
        """Take over both sockets, non-blocking and connected; `start()` begins."""
        self.error: str | None = None
        self.reservoir: Reservoir | None = None
        self.on_finished: Callable[[PlainRelay], None] | None = None
        self._loop = loop
        self._view = buffers.plain_view
        self._splicer = splicer
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
        if mask & OUT and half.other.owing:
            self._drain(half.other)
        if mask & (IN | BEYOND) and not self._finished:
            half.readable = True
            half.exhaust = half.exhaust or bool(mask & BEYOND)
            self._pump(half)

    def _pump(self, half: _Half) -> None:
        """Move bytes from `half` to its other: one block, or until nothing is there."""
        if half.ended or half.owing:
            return
        if not half.bulk or not self._splice(half):
            self._receive(half)

    def _receive(self, half: _Half) -> None:
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
        half.bulk = self._splicer is not None and self._splicer.is_bulk(half.bytes, count)
        if not self._send(half, self._view[:count]):
            return
        if count == len(self._view) or half.exhaust:
            self._requeue(half)
        else:
            half.readable = False

    def _splice(self, half: _Half) -> bool:
        """Move a block by a pipe; False if it has to be received."""
        splicer = self._splicer
        if splicer is None:
            return False
        try:
            pipe = half.pipe = splicer.take_in(half.fd)
        except OSError as error:
            self.abort(f"receive: {error.strerror}")
            return True
        if pipe is None:
            return False
        half.bytes += pipe.held
        half.bulk = splicer.is_bulk(half.bytes, pipe.held)
        if self._pass_on(half, splicer, pipe):
            self._requeue(half)
        return True

    def _pass_on(self, half: _Half, splicer: Splicer, pipe: Pipe) -> bool:
        """Send what stands in the pipe; False if not all of it went."""
        try:
            done = splicer.pass_on(pipe, half.other.fd)
        except BlockingIOError:
            return False
        except OSError as error:
            self.abort(f"send: {error.strerror}")
            return False
        if done:
            half.pipe = None
        else:
            self._requeue(half)
        return done

    def _send(self, half: _Half, view: memoryview) -> bool:
        """Send to the other side; False if not all of it went."""
        try:
            count = half.other.sock.send(view)
        except BlockingIOError:
            count = 0
        except OSError as error:
            self.abort(f"send: {error.strerror}")
            return False
        if half.backlog is not None:
            half.backlog = view[count:]
        elif count < len(view):
            self._keep(half, view[count:])
        return count == len(view)

    def _keep(self, half: _Half, rest: memoryview) -> None:
        """What the other side has not taken waits, as far as the pod may keep so much."""
        if self.reservoir is None or self.reservoir.take(len(rest)):
            half.kept = len(rest)
            half.backlog = memoryview(bytes(rest))
        else:
            self.abort("too much is kept for apps that do not read")

    def _drain(self, half: _Half) -> None:
        if not self._settle(half):
            return
        if half.ended:
            self._pass_end(half)
        elif half.readable:
            self._requeue(half)

    def _settle(self, half: _Half) -> bool:
        """Send what is owed; False if something of it still is."""
        if half.pipe is not None and self._splicer is not None:
            return self._pass_on(half, self._splicer, half.pipe)
        if half.backlog is not None:
            if not self._send(half, half.backlog):
                return False
            self._let_go(half)
        return True

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
        if self._finished:
            return
        if half.owing:
            self._drain(half)
        elif half.readable:
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
            self._let_go(half)
            if graceful:
                half.sock.close()
            else:
                reset(half.sock)
        finished, self.on_finished = self.on_finished, None
        # The halves refer to one another: memory is free without a collection.
        self._near.other, self._far.other = self._near, self._far
        if finished is not None:
            finished(self)

    def _let_go(self, half: _Half) -> None:
        """Nothing is owed any more, or what is is lost."""
        if half.pipe is not None and self._splicer is not None:
            self._splicer.drop(half.pipe)
        if half.backlog is not None and self.reservoir is not None:
            self.reservoir.give(half.kept)
        half.pipe = half.backlog = None

    def __repr__(self) -> str:
        state = "finished" if self._finished else "open"
        return f"<PlainRelay {state}, {self._near.bytes} bytes out, {self._far.bytes} back>"
