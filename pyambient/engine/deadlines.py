"""Deadlines without a trio task or a timer per connection.

All deadlines of one `Deadlines` are the same number of seconds long, so they expire in the order
in which they were started: a queue, and one trio task that sleeps until its head is due. Starting
or cancelling one costs an append or an assignment.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio


class Deadline:
    """One running deadline; `cancel()` it when what it guards has happened."""

    __slots__ = ("due", "expired")

    def __init__(self, due: float, expired: Callable[[], None]) -> None:
        self.due = due
        self.expired: Callable[[], None] | None = expired

    def cancel(self) -> None:
        self.expired = None


class Deadlines:
    """A queue of deadlines of `seconds` each; `run()` must be running."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._queue: deque[Deadline] = deque()
        self._started = trio.Event()

    def start(self, expired: Callable[[], None]) -> Deadline:
        """Call `expired()` after `seconds`, unless cancelled before."""
        deadline = Deadline(trio.current_time() + self.seconds, expired)
        self._queue.append(deadline)
        if not self._started.is_set():
            self._started.set()
        return deadline

    async def run(self) -> None:
        """Expire deadlines, forever."""
        while True:
            await self._started.wait()
            while self._queue:
                await trio.sleep_until(self._queue[0].due)
                self._expire()
            self._started = trio.Event()

    def _expire(self) -> None:
        now = trio.current_time()
        queue = self._queue
        while queue and (queue[0].expired is None or queue[0].due <= now):
            expired = queue.popleft().expired
            if expired is not None:
                expired()

    def __repr__(self) -> str:
        return f"<Deadlines of {self.seconds:g} s, {len(self._queue)} running>"
