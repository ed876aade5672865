"""How certificates are fetched once for everyone, and what happens when that fails."""

from __future__ import annotations

import itertools

import pytest
import trio
import trio.testing

from pyambient.errors import UsageError
from pyambient.identity.certificate import IdentityError
from pyambient.identity.store import MAX_SIGNING, SIGN_TIMEOUT, CertificateStore
from pyambient.model.spiffe import SpiffeId

from .scripted import HALF_LIFE, Authority, collect, play
from .tls import CLIENT, SERVER


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
