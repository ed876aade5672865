"""Fair shares of the loop for work that is heavy by the piece.

trio runs all tasks that are ready in one go, and a tunnel hands on all requests that a buffer
holds. A step of a handshake takes half a millisecond, a request a tenth: without a pace, thirty
handshakes of one peer hold up every other connection for as long as they take together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType

import trio

from .loop import Loop


class Pacer:
    """`async with` it around a heavy step: the loop makes a turn before the next one's step."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._busy = False
        self._waiting: deque[trio.Event] = deque()

    async def __aenter__(self) -> None:
        if not self._busy:
            self._busy = True
            return
        turn = trio.Event()
        self._waiting.append(turn)
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():
                self._loop.call_soon(self._pass_on)
            else:
                self._waiting.remove(turn)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._loop.call_soon(self._pass_on)

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._busy = False

    def __repr__(self) -> str:
        return f"<Pacer, {len(self._waiting)} waiting>"


class Queue:
    """Calls in their order, at most `a_turn` of them in a turn of the loop."""

    def __init__(self, loop: Loop, a_turn: int) -> None:
        self._loop = loop
        self._a_turn = a_turn
        self._calls: deque[Callable[[], None]] = deque()
        self._left = a_turn
        self._refilling = False

    def call(self, function: Callable[[], None]) -> None:
        """Call `function` now, or in a later turn if this one has had its share."""
        if self._left and not self._calls:
            self._left -= 1
            self._refill_soon()
            function()
        else:
            self._calls.append(function)

    def _refill_soon(self) -> None:
        if not self._refilling:
            self._refilling = True
            self._loop.call_soon(self._refill)

    def _refill(self) -> None:
        self._refilling = False
        self._left = self._a_turn
        calls = self._calls
        if calls:
            self._refill_soon()
        while self._left and calls:
            self._left -= 1
            calls.popleft()()

    def clear(self) -> None:
        """Forget what waits."""
        self._calls.clear()

    def __repr__(self) -> str:
        return f"<Queue of {len(self._calls)} calls>"
