"""The engine's loop the other way round, to be compared with: trio is the host, the loop its guest.

One trio task waits for the loop's epoll and makes its turns. It is what would be simplest; the
product's loop hosts trio instead (`pyambient/engine/loop.py`), because of what
`python -m pyambient.bench.engine.loops` says.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from pyambient.engine.loop import Flushable, Loop

T = TypeVar("T")
# Turns before trio has one: with fewer, its scheduler is a larger part of each.
_TURNS = 32


class NestedLoop(Loop):
    """A loop whose turns are made by a trio task."""

    def __init__(self, report: Callable[[BaseException, object], None] | None = None) -> None:
        super().__init__(report)
        self._waiting = False

    def call_soon(self, function: Callable[[], None]) -> None:
        super().call_soon(function)
        self._wake()

    def flush_soon(self, flushable: Flushable) -> None:
        super().flush_soon(flushable)
        self._wake()

    def _wake(self) -> None:
        """Another task has work for the loop, whose own waits for events."""
        if self._waiting:
            self._waiting = False
            os.eventfd_write(self._wakeup, 1)

    def run(self, main: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Run `main(*args)` under trio, and the loop beside it."""
        return trio.run(self._host, main, args, strict_exception_groups=True)

    async def _host(self, main: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> T:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._turns)
                result = await main(*args)
                nursery.cancel_scope.cancel()
        finally:
            self._close()
        return result

    async def _turns(self) -> None:
        while True:
            if self._make_turns():
                await trio.lowlevel.checkpoint()
            else:
                self._waiting = True
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                self._waiting = False

    def _make_turns(self) -> bool:
        """A number of turns, less if there is nothing to do any more; whether there still is."""
        for _ in range(_TURNS):
            if not self._turn(0) and not self._ready and not self._dirty:
                return False
        return True
