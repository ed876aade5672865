"""Bytes that are kept for apps and peers that do not read, counted and bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Unread(Protocol):
    """Who answers for what one tunnel keeps because its peer does not read: its pod's budget."""

    @property
    def scarce(self) -> bool:
        """Half of what may be kept is: from here on with small blocks, so that many can wait."""

    def keep(self, count: int) -> bool:
        """So many bytes are kept now, and not what was said before; False if that is too much."""


class Reservoir:
    """What the relays of one pod may keep together; a part of a larger one, which all pods share.

    A stream's window bounds what one app can have kept for it. This bounds what many can.
    """

    __slots__ = ("held", "limit", "on_full", "whole")

    def __init__(self, limit: int, whole: Reservoir | None = None) -> None:
        """At most `limit` bytes, and no more than `whole` has left; `on_full` hears of refusals."""
        self.limit = limit
        self.whole = whole
        self.on_full: Callable[[], None] | None = None
        self.held = 0

    def fits(self, count: int) -> bool:
        """Whether `take` would keep so many bytes more."""
        whole = self.whole
        return self.held + count <= self.limit and (whole is None or whole.fits(count))

    def take(self, count: int) -> bool:
        """Keep `count` bytes more; False, and nothing is taken, if that is too much."""
        if not self.fits(count):
            if self.on_full is not None:
                self.on_full()
            return False
        self.held += count
        if self.whole is not None:
            self.whole.take(count)
        return True

    def give(self, count: int) -> None:
        """`count` of them are not kept any more."""
        self.held -= count
        if self.whole is not None:
            self.whole.give(count)

    def __repr__(self) -> str:
        return f"<Reservoir holding {self.held} of {self.limit} bytes>"
