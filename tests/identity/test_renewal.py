"""How certificates are kept fresh, kept when the authority is down, and given up."""

from __future__ import annotations

from datetime import timedelta

import pytest
import trio

from pyambient.identity.certificate import Certificate, IdentityError
from pyambient.identity.store import CertificateStore

from .scripted import HALF_LIFE, LIFETIME, Authority, collect, play
from .tls import CLIENT


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
