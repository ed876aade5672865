"""Listening sockets and connecting sockets on the loop."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from pyambient.model.address import SocketAddress, from_sockaddr

from .deadlines import Deadline, Deadlines
from .loop import IN, OUT, Loop

# Each costs a tenth of a millisecond once its owner has dealt with it. More of them a turn cost 4 %
# less CPU, but the others' p99 half as much again, and no more connections come through.
_ACCEPTS_A_TURN = 2
# What accept(2) says of one connection or of a shortage; the listener itself is all right.
_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

Accepted = Callable[[socket.socket, SocketAddress], None]


class Listener:
    """A listening socket; from `start` on `accepted(socket, peer)` gets connections, non-blocking.

    Those that come before wait in the kernel.
    When descriptors run out it stops accepting for as long as `pause` says: accept(2) would
    report the same connection again at once, and the loop would spin.
    """

    def __init__(
        self, loop: Loop, sock: socket.socket, accepted: Accepted, pause: Deadlines
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._accepted = accepted
        self._pause = pause
        self._paused: Deadline | None = None
        self._batch = 1
        self.shortages = 0
        sock.setblocking(False)

    def start(self) -> None:
        """Accept from now on."""
        self._loop.watch(self._sock.fileno(), self._on_events, IN)

    def set_mark(self, mark: int) -> None:
        """Give what it accepts from now on this SO_MARK; with 0 the kernel chooses one."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)

    def _on_events(self, _mask: int) -> None:
        """Accept as many as came last time, twice that if they were all there.

        The listener is watched level-triggered, so what is left over is told again; asking until
        there are none costs a failing system call for each connection that comes alone.
        """
        for done in range(self._batch):
            try:
                connection, sockaddr = self._sock.accept()
            except BlockingIOError:
                self._batch = max(1, done)
                return
            except OSError as error:
                if error.errno in _SHORTAGE:
                    self._stop_for_a_moment()
                    return
                continue
            connection.setblocking(False)
            self._accepted(connection, from_sockaddr(sockaddr))
        self._batch = min(2 * self._batch, _ACCEPTS_A_TURN)

    def _stop_for_a_moment(self) -> None:
        self.shortages += 1
        self._loop.unwatch(self._sock.fileno())
        self._paused = self._pause.start(self._go_on)

    def _go_on(self) -> None:
        self._paused = None
        self._loop.watch(self._sock.fileno(), self._on_events, IN)

    def close(self) -> None:
        """Stop listening; connections already accepted live on."""
        if self._paused is not None:
            self._paused.cancel()
        if self._sock.fileno() >= 0:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()

    def __repr__(self) -> str:
        state = "paused: out of descriptors" if self._paused is not None else "accepting"
        return f"<Listener fd {self._sock.fileno()}, {state}>"


def connect(sock: socket.socket, destination: SocketAddress) -> bool:
    """Start connecting non-blocking `sock`; whether it is connected already. OSError if refused.

    Over lo, where the apps of a pod are, the handshake is done when the first call returns, but
    only a second one says so: cheaper than a turn of the loop with three system calls.
    """
    address = destination.sockaddr()
    code = sock.connect_ex(address)
    if code == errno.EINPROGRESS:
        code = sock.connect_ex(address)
    if code in (errno.EALREADY, errno.EINPROGRESS):
        return False
    if code not in (0, errno.EISCONN):
        raise OSError(code, os.strerror(code))
    return True


class Dial:
    """A connect(2) under way; `done(error)` is called once, with None when it succeeded.

    The socket is the caller's again when `done` is called, and when `cancel()` returns.
    """

    __slots__ = ("_deadline", "_done", "_fd", "_loop", "_sock")

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        timeouts: Deadlines,
        done: Callable[[OSError | None], None],
    ) -> None:
        """Wait for what `connect` has started on `sock`."""
        self._loop = loop
        self._sock = sock
        self._done = done
        self._fd = sock.fileno()
        self._deadline = timeouts.start(self._expired)
        loop.watch(self._fd, self._on_events, OUT)

    def _on_events(self, _mask: int) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._end(OSError(code, os.strerror(code)) if code else None)

    def _expired(self) -> None:
        self._end(TimeoutError(errno.ETIMEDOUT, "connection timed out"))

    def _end(self, error: OSError | None) -> None:
        self.cancel()
        self._done(error)

    def crashed(self, error: BaseException) -> None:
        """The caller's `done` raised; it has the socket already."""

    def cancel(self) -> None:
        """Stop watching; `done` is not called any more."""
        self._deadline.cancel()
        self._loop.unwatch(self._fd)

    def __repr__(self) -> str:
        return f"<Dial on fd {self._fd}>"
