"""The epoll loop of a worker, with trio as its guest.

General theory of operation
---------------------------
Bytes move in callbacks; everything that waits is a trio task. Both live on one thread: the loop
is the host, trio runs on it by `trio.lowlevel.start_guest_run`, so there are no locks, and a trio
task may call into the byte path (open a stream, close a relay) and a callback may call trio's
synchronous functions (`Event.set`, `nursery.start_soon`) as if they were in one another. trio
costs a thread hand-over only when a task of its own waits for I/O or time.

One turn of the loop does three things, each bounded, so that no connection can hold the others:

1. `epoll` gives at most `_EVENTS_A_TURN` events; each goes to its handler once.
2. Whoever called `call_soon` before this point gets one call. A relay that read a full block
   queues itself here instead of reading on: that is the fairness between relays.
3. Whoever called `flush_soon` gets its `flush()`: many small frames leave in one TLS record.

A handler is a bound method that takes the event mask. Descriptors of app sockets are registered
edge-triggered once and for all; a handler must then read until EAGAIN or queue itself.

A handler that raises is a bug. It must not take the other pods with it: the loop logs it and
calls `crashed()` on the handler's object, which closes what it owns.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import outcome
import trio

T = TypeVar("T")
Handler = Callable[[int], None]
IN = select.EPOLLIN
OUT = select.EPOLLOUT
GONE = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP
# A short read gave all there was, but for these: recv(2) stops short of urgent data and of the end.
BEYOND = GONE | select.EPOLLPRI
# A peer's reset, not its FIN: that may be a half-close.
RESET = select.EPOLLHUP | select.EPOLLERR
# An app socket is watched edge-triggered: no epoll_ctl per block. At first not for OUT, as every
# socket is writable to begin with, and that event would cost a connection a turn of the loop.
APP_EVENTS = select.EPOLLIN | select.EPOLLPRI | select.EPOLLRDHUP | select.EPOLLET
ALL_APP_EVENTS = APP_EVENTS | select.EPOLLOUT
_EVENTS_A_TURN = 256


class Flushable(Protocol):
    """Something with bytes to send at the end of a turn."""

    def flush(self) -> None: ...


class Loop:
    """An epoll loop that hosts trio; see the top of this file."""

    def __init__(self, report: Callable[[BaseException, object], None] | None = None) -> None:
        """`report` is told of a handler's exception and the handler's owner."""
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._fresh: set[int] = set()
        self._ready: deque[Callable[[], None]] = deque()
        self._dirty: dict[Flushable, None] = {}
        self._guest_calls: deque[Callable[[], object]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._report = report
        self.watch(self._wakeup, self._woken, IN)

    def watch(self, fd: int, handler: Handler, events: int) -> None:
        """Call `handler(mask)` whenever `fd` has one of `events`."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler
        self._fresh.add(fd)

    def rewatch(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Forget `fd`, which goes on to live. Unknown descriptors are fine."""
        if self._handlers.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        """Forget `fd`, which is closed next: the kernel takes it out of the epoll by itself."""
        self._handlers.pop(fd, None)

    def call_soon(self, function: Callable[[], None]) -> None:
        """Call `function` once in the next turn."""
        self._ready.append(function)

    def flush_soon(self, flushable: Flushable) -> None:
        """Call `flushable.flush()` once at the end of this turn."""
        self._dirty[flushable] = None

    def run(self, main: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run `main(*args)` under trio, hosted by this loop; its result or its exception."""
        finished: list[outcome.Outcome[T]] = []
        trio.lowlevel.start_guest_run(
            main,
            *args,
            run_sync_soon_threadsafe=self._call_guest_from_thread,
            run_sync_soon_not_threadsafe=self._guest_calls.append,
            done_callback=finished.append,
            host_uses_signal_set_wakeup_fd=False,
            strict_exception_groups=True,
        )
        try:
            while not finished:
                busy = self._ready or self._guest_calls or self._dirty
                self._turn(0 if busy else None)
        finally:
            self._close()
        return finished[0].unwrap()

    def _turn(self, timeout: float | None) -> int:
        """One turn, after waiting so many seconds for an event; how many there were."""
        fresh = self._fresh
        fresh.clear()
        events = self._epoll.poll(timeout, _EVENTS_A_TURN)
        for fd, mask in events:
            handler = self._handlers.get(fd)
            # A descriptor closed and opened again in this batch must not see the old one's event.
            if handler is None or fd in fresh:
                continue
            try:
                handler(mask)
            except Exception as error:  # noqa: BLE001 - a bug in one connection spares the others
                self._crashed(handler, error)
        if self._guest_calls:
            for _ in range(len(self._guest_calls)):
                self._guest_calls.popleft()()
        if self._ready:
            for _ in range(len(self._ready)):
                self._call(self._ready.popleft())
        if self._dirty:
            dirty, self._dirty = self._dirty, {}
            for flushable in dirty:
                self._call(flushable.flush)
        return len(events)

    def _call(self, function: Callable[[], None]) -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - as in _turn
            self._crashed(function, error)

    def _crashed(self, handler: Callable[..., None], error: BaseException) -> None:
        owner = getattr(handler, "__self__", None)
        if self._report is None:
            raise error
        self._report(error, owner)
        crashed = getattr(owner, "crashed", None)
        if crashed is not None:
            crashed(error)

    def _woken(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wakeup)

    def _call_guest_from_thread(self, function: Callable[[], object]) -> None:
        self._guest_calls.append(function)
        os.eventfd_write(self._wakeup, 1)

    def _close(self) -> None:
        self._epoll.close()
        os.close(self._wakeup)
        self._handlers.clear()

    def __repr__(self) -> str:
        return f"<Loop watching {len(self._handlers)} descriptors>"
