"""The queue for all that works on the kernel: one thing at a time, in trio's worker threads."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import ParamSpec, TypeVar

import trio

_P = ParamSpec("_P")
_T = TypeVar("_T")


class KernelQueue:
    """Who waits gets its turn in the order of coming."""

    def __init__(self) -> None:
        self._one = trio.CapacityLimiter(1)

    async def run(self, work: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
        """What `work` returns or raises."""
        return await trio.to_thread.run_sync(partial(work, *args, **named), limiter=self._one)

    def __repr__(self) -> str:
        return f"<KernelQueue {self._one.statistics().tasks_waiting} waiting>"


@contextlib.asynccontextmanager
async def beside(work: Callable[[], None]) -> AsyncIterator[None]:
    """Have a thread do `work` meanwhile; both have ended when the block has."""
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, work)
            yield
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
