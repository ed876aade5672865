"""How many queries may be in flight, and whose: a total for the process, fairly shared by pods.

A pod may use all of it while nobody else wants any. When it is used up and a pod asks that has
less than the greediest one, that one's oldest query is given up for it ("longest queue drop": it
wastes nothing while there is room, and nobody can keep another out). A pod that is itself the
greediest is refused. Whatever is given up or refused is counted, and dropped without an answer:
answering a flood doubles it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

import trio


class InFlight(Protocol):
    """A query that is being asked."""

    def drop(self) -> None:
        """Give the query up without an answer, and release it."""


class Budget:
    """The queries in flight of all pods of a process, `limit` at most."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._shares: dict[Share, None] = {}
        self.in_flight = 0

    def share(self) -> Share:
        """A pod's part of it; `close` it with the pod."""
        share = Share(self)
        self._shares[share] = None
        return share

    def has_room(self, share: Share) -> bool:
        """Whether one more query of `share` fits in; another's oldest may be given up for it."""
        if self.in_flight < self._limit:
            return True
        if 2 * len(share) >= self._limit:
            return False
        greediest = max(self._shares, key=len)
        if len(greediest) <= len(share) + 1:
            return False
        greediest.drop_oldest()
        return True

    def forget(self, share: Share) -> None:
        self._shares.pop(share, None)

    def __repr__(self) -> str:
        return f"<Budget {self.in_flight} of {self._limit} queries, {len(self._shares)} pods>"


class Share:
    """The queries in flight of one pod, oldest first."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        # Ordered: the first entry of a plain dict is found past all those deleted before it.
        self._queries: OrderedDict[InFlight, None] = OrderedDict()
        self.dropped = 0
        self._released = trio.Event()

    def admit(self, query: InFlight) -> bool:
        """Count a query in until it is released; False, and counted as dropped, if it may not."""
        if not self._budget.has_room(self):
            self.dropped += 1
            return False
        self._queries[query] = None
        self._budget.in_flight += 1
        return True

    def release(self, query: InFlight) -> None:
        """A query is over; releasing it twice is no error."""
        if query in self._queries:
            del self._queries[query]
            self._budget.in_flight -= 1
            self._released.set()

    def drop_oldest(self) -> None:
        self.dropped += 1
        next(iter(self._queries)).drop()

    async def wait_over(self) -> None:
        """Wait until the queries that are in flight now are over."""
        for query in list(self._queries):
            while query in self._queries:
                self._released = trio.Event()
                await self._released.wait()

    def close(self) -> None:
        """Drop what is in flight."""
        for query in list(self._queries):
            query.drop()
        self._budget.forget(self)

    def __len__(self) -> int:
        return len(self._queries)

    def __repr__(self) -> str:
        return f"<Share {len(self._queries)} queries in flight, {self.dropped} dropped>"
