"""A store on a clock that jumps, and an authority that does as the test says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import trio
import trio.testing

from pyambient.identity.certificate import Certificate, IdentityError
from pyambient.identity.store import CertificateStore
from pyambient.model.spiffe import SpiffeId

START = datetime(2026, 11, 24, tzinfo=UTC)
LIFETIME = 86400.0
SKEW = 120.0
HALF_LIFE = (LIFETIME - SKEW) / 2


class Authority:
    """Signs after `delay` seconds, or fails with what `failure` holds; remembers when."""

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.jump = timedelta(0)
        self.failure: Exception | None = None
        self.asked: list[float] = []
        self.busy = 0
        self.most_busy = 0

    async def sign(self, identity: SpiffeId) -> Certificate:
        self.asked.append(trio.current_time())
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        try:
            await trio.sleep(self.delay)
        finally:
            self.busy -= 1
        if self.failure is not None:
            raise self.failure
        serial = str(len(self.asked)).encode()
        born = self.now() - timedelta(seconds=SKEW)
        until = self.now() + timedelta(seconds=LIFETIME)
        return Certificate(identity, serial, (serial,), (), born, until)

    def now(self) -> datetime:
        """The date by trio's clock, which the tests turn, and by what they set it forward."""
        return START + timedelta(seconds=trio.current_time()) + self.jump


Scenario = Callable[[Authority, CertificateStore], Awaitable[None]]


def play(scenario: Scenario, *, delay: float = 0.0) -> Authority:
    """Run `scenario` with a store that runs, on a clock that jumps over every sleep."""
    authority = Authority(delay)

    async def main() -> None:
        store = CertificateStore(authority, authority.now)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            await scenario(authority, store)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return authority


async def collect(count: int, ask: Callable[[], Awaitable[Certificate]]) -> list[object]:
    """What `count` tasks that ask at once get: certificates, or the texts of errors."""
    outcomes: list[object] = []

    async def one() -> None:
        try:
            outcomes.append(await ask())
        except IdentityError as error:
            outcomes.append(str(error))

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
    return outcomes
