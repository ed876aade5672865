"""How certificates are fetched once, kept fresh, and kept when the authority is down."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest
import trio
import trio.testing

from pyambient.errors import UsageError
from pyambient.identity.certificate import Certificate, IdentityError
from pyambient.identity.store import MAX_SIGNING, SIGN_TIMEOUT, CertificateStore
from pyambient.model.spiffe import SpiffeId

from .tls import CLIENT, SERVER

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


class TestFetch:
    def test_current_starts_nothing(self) -> None:
        """The hot path never asks the authority."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            assert store.current(CLIENT) is None
            await trio.sleep(60)

        assert play(scenario).asked == []

    def test_get_leaves_it_current(self) -> None:
        """What was waited for once is there at once from then on."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            certificate = await store.get(CLIENT)
            assert certificate.identity == CLIENT
            assert store.current(CLIENT) is certificate
            assert await store.get(CLIENT) is certificate

        assert len(play(scenario).asked) == 1

    def test_single_flight(self) -> None:
        """A hundred connections that ask at once are one request, and get one certificate."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            outcomes = await collect(100, lambda: store.get(CLIENT))
            assert len(outcomes) == 100
            assert len(set(map(id, outcomes))) == 1

        assert len(play(scenario, delay=3).asked) == 1

    def test_identities_are_apart(self) -> None:
        """One certificate per identity, each fetched on its own."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            assert (await store.get(CLIENT)).identity == CLIENT
            assert (await store.get(SERVER)).identity == SERVER
            assert repr(store) == "<CertificateStore 2 identities, 2 with a certificate>"

        assert len(play(scenario).asked) == 2

    def test_few_requests_at_once(self) -> None:
        """A node that starts with many pods does not flood the authority."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            async with trio.open_nursery() as nursery:
                for number in range(50):
                    identity = SpiffeId("cluster.local", "default", f"pod{number}")
                    nursery.start_soon(store.get, identity)

        authority = play(scenario, delay=1)
        assert len(authority.asked) == 50
        assert authority.most_busy == MAX_SIGNING

    def test_asked_before_run(self) -> None:
        """A pod that comes while the proxy starts gets its certificate when the store runs."""
        authority = Authority()

        async def main() -> None:
            store = CertificateStore(authority, authority.now)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(store.get, CLIENT)
                await trio.sleep(5)
                assert authority.asked == []
                await nursery.start(store.run)
                assert await store.get(CLIENT) is store.current(CLIENT)
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert authority.asked == [5.0]

    def test_cancelled_caller(self) -> None:
        """A caller that gives up takes nothing from those who still wait."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            async with trio.open_nursery() as nursery:
                with trio.move_on_after(1) as scope:
                    await store.get(CLIENT)
                nursery.start_soon(store.get, CLIENT)
            assert scope.cancelled_caught
            assert store.current(CLIENT) is not None

        assert len(play(scenario, delay=3).asked) == 1


class TestFailure:
    def test_wakes_everyone_with_the_same_error(self) -> None:
        """All who wait hear why, from the one attempt that was made."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = IdentityError("the authority is closed", "come back on Monday")
            outcomes = await collect(100, lambda: store.get(CLIENT))
            assert outcomes == ["the authority is closed; come back on Monday"] * 100
            assert len(authority.asked) == 1

        play(scenario, delay=3)

    def test_fails_at_once_between_attempts(self) -> None:
        """Nobody waits for a backoff to pass, and nobody shortens it."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = IdentityError("down")
            await collect(1, lambda: store.get(CLIENT))
            before = trio.current_time()
            assert await collect(10, lambda: store.get(CLIENT)) == ["down"] * 10
            assert trio.current_time() == before
            assert len(authority.asked) == 1

        play(scenario, delay=3)

    def test_recovers_by_itself(self) -> None:
        """When the authority is back the next attempt succeeds without being asked for."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = IdentityError("down")
            await collect(1, lambda: store.get(CLIENT))
            authority.failure = None
            await trio.sleep(1.2)
            assert store.current(CLIENT) is not None
            assert await store.get(CLIENT) is store.current(CLIENT)

        play(scenario)

    def test_backoff(self) -> None:
        """One second, doubled up to 150, each a fifth longer or shorter."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = IdentityError("down")
            await collect(1, lambda: store.get(CLIENT))
            await trio.sleep(3600)

        asked = play(scenario).asked
        pauses = [after - before for before, after in itertools.pairwise(asked)]
        for pause, doubled in zip(pauses, [1, 2, 4, 8, 16, 32, 64, 128], strict=False):
            assert 0.8 * doubled <= pause <= 1.2 * doubled
        assert len(pauses) > 20
        assert all(120 <= pause <= 180 for pause in pauses[8:])

    def test_success_resets_the_backoff(self) -> None:
        """After a certificate the next failure is followed by a short pause again."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = IdentityError("down")
            await collect(1, lambda: store.get(CLIENT))
            await trio.sleep(200)
            authority.failure = None
            await trio.sleep(160)
            assert store.current(CLIENT) is not None
            authority.asked.clear()
            authority.failure = IdentityError("down")
            await trio.sleep(HALF_LIFE)
            first, second = authority.asked[:2]
            assert second - first <= 1.2

        play(scenario)

    @pytest.mark.parametrize(
        ("failure", "text"),
        [
            (
                UsageError("bad token", "mount one"),
                f"no certificate for {CLIENT}: bad token; mount",
            ),
            (OSError("no route"), "the authority failed (OSError: no route)"),
            (KeyError("bug"), "the authority failed (KeyError: 'bug')"),
        ],
    )
    def test_any_fault_is_one_identitys(self, failure: Exception, text: str) -> None:
        """Even a bug in an authority fails the one identity, and the store runs on."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = failure
            (outcome,) = await collect(1, lambda: store.get(CLIENT))
            assert text in str(outcome)
            authority.failure = None
            assert (await store.get(SERVER)).identity == SERVER

        play(scenario)

    def test_silent_authority(self) -> None:
        """An authority that never answers is an error after ten seconds, not a hang."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            (outcome,) = await collect(1, lambda: store.get(CLIENT))
            assert "did not answer" in str(outcome)
            assert trio.current_time() == SIGN_TIMEOUT

        play(scenario, delay=1e9)


class TestRenewal:
    def test_at_half_life(self) -> None:
        """The certificate is replaced when half of its life is over, and who asked is told."""
        renewed: list[Certificate] = []

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            store.on_renewed(renewed.append)
            first = await store.get(CLIENT)
            await trio.sleep(HALF_LIFE - 1)
            assert store.current(CLIENT) is first
            await trio.sleep(2)
            assert store.current(CLIENT) is not first
            assert renewed == [store.current(CLIENT)]

        asked = play(scenario).asked
        assert asked == pytest.approx([0, HALF_LIFE])

    def test_valid_certificate_is_kept_on_failure(self) -> None:
        """An authority that is down for hours is not noticed by any connection."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            first = await store.get(CLIENT)
            authority.failure = IdentityError("down")
            await trio.sleep(LIFETIME - 10)
            assert len(authority.asked) > 100
            assert store.current(CLIENT) is first
            assert await store.get(CLIENT) is first

        play(scenario)

    def test_expired_certificate_is_not_served(self) -> None:
        """After its time the certificate is gone, and the reason is the failed renewal's."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            await store.get(CLIENT)
            authority.failure = IdentityError("down")
            await trio.sleep(LIFETIME + 1)
            assert store.current(CLIENT) is None
            assert await collect(1, lambda: store.get(CLIENT)) == ["down"]
            assert repr(store) == "<CertificateStore 1 identities, 0 with a certificate>"

        play(scenario)

    def test_attempt_at_the_moment_of_expiry(self) -> None:
        """A backoff never sleeps past the end of the certificate at hand."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            await store.get(CLIENT)
            authority.failure = IdentityError("down")
            await trio.sleep(LIFETIME + 1)
            assert any(moment == pytest.approx(LIFETIME) for moment in authority.asked)

        play(scenario)

    def test_clock_that_jumps(self) -> None:
        """After a suspend past the expiry the first caller starts a renewal and gets it."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            await store.get(CLIENT)
            await trio.sleep(100)
            authority.jump = timedelta(seconds=LIFETIME)
            assert store.current(CLIENT) is None
            renewed = await store.get(CLIENT)
            assert renewed is store.current(CLIENT)
            assert trio.current_time() == 100

        assert play(scenario).asked == [0, 100]

    def test_an_error_is_forgotten_with_the_next_success(self) -> None:
        """What failed hours ago does not keep a caller from a renewal now."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            authority.failure = IdentityError("down")
            await collect(1, lambda: store.get(CLIENT))
            authority.failure = None
            await trio.sleep(100)
            authority.jump = timedelta(seconds=LIFETIME)
            assert (await store.get(CLIENT)).identity == CLIENT

        play(scenario)

    def test_clock_that_is_set_forward(self) -> None:
        """Nobody has to ask: the date is looked at every few minutes."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            await store.get(CLIENT)
            authority.jump = timedelta(seconds=HALF_LIFE)
            await trio.sleep(600)

        assert len(play(scenario).asked) == 2

    def test_no_spin(self) -> None:
        """An authority whose clock is far behind is asked once a second, not all the time."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            store._now = lambda: authority.now() + timedelta(seconds=HALF_LIFE + 1)
            await store.get(CLIENT)
            await trio.sleep(10.5)

        assert len(play(scenario).asked) == 11


class TestForget:
    def test_renews_no_more(self) -> None:
        """An identity without pods costs the authority nothing."""

        async def scenario(authority: Authority, store: CertificateStore) -> None:
            await store.get(CLIENT)
            store.forget(CLIENT)
            assert store.current(CLIENT) is None
            await trio.sleep(2 * LIFETIME)
            assert len(authority.asked) == 1
            assert repr(store) == "<CertificateStore 0 identities, 0 with a certificate>"

        play(scenario)

    def test_wakes_those_who_wait(self) -> None:
        """A connection of a pod that goes away meanwhile is told, at once."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            async def forget_soon() -> None:
                await trio.sleep(1)
                store.forget(CLIENT)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(forget_soon)
                outcomes = await collect(2, lambda: store.get(CLIENT))
            assert outcomes == [f"{CLIENT} was given up; enrol a pod that has it"] * 2
            assert trio.current_time() == 1

        play(scenario, delay=3)

    def test_can_come_back(self) -> None:
        """A pod enrolled again gets a certificate again."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            first = await store.get(CLIENT)
            store.forget(CLIENT)
            assert await store.get(CLIENT) is not first

        assert len(play(scenario).asked) == 2

    def test_unknown_identity(self) -> None:
        """Forgetting what was never asked for is nothing."""

        async def scenario(_authority: Authority, store: CertificateStore) -> None:
            store.forget(CLIENT)

        assert play(scenario).asked == []
