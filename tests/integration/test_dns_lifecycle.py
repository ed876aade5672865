"""DNS while pods are enrolled and freed and the proxy goes and comes."""

from __future__ import annotations

import errno

import pytest

from pyambient.dns.message import SERVFAIL
from pyambient.model.address import SocketAddress
from tests.bed import BedPod, Child
from tests.dns import build

from . import resolver
from .conftest import Pair

pytestmark = pytest.mark.parametrize(
    "backend", ["bpf", "tc", "nftables", "iptables"], scope="module"
)
_IDENTS = list(range(0x4000, 0x4014))
_QUERIES = [build.query(ident) for ident in _IDENTS]
_ANSWERS = [build.answer_to(query) for query in _QUERIES]
_ENDED = (errno.EDESTADDRREQ, errno.ECONNABORTED)
_SILENT = build.query(text="silent.example.com")


def serve(pair: Pair) -> Child:
    child = pair.outside.spawn(resolver.resolver, uid=0, gid=0)
    assert child.receive() == "listening"
    return child


def resolver_of(pair: Pair, family: str) -> SocketAddress:
    return SocketAddress(pair.outside.address(family), resolver.PORT)


def is_answered(pod: BedPod, address: SocketAddress) -> bool:
    def ask() -> bool:
        try:
            return bool(resolver.ask(address, build.query()))
        except OSError:
            return False

    return bool(pod.run(ask))


def test_freeing_a_pod_answers_what_it_has_asked_and_lets_it_ask_by_itself(
    strangers: Pair, family: str
) -> None:
    """While it is enrolled the resolver sees the proxy's ids, then the app's own."""
    strangers.enroll()
    client, address = strangers.client, resolver_of(strangers, family)
    with serve(strangers) as server:
        silent = client.spawn(lambda _: resolver.ask(address, _SILENT))
        strangers.mesh.wait_until(lambda: server.ask("seen"), "query at the resolver")
        client.run(resolver.ask, address, *_QUERIES)
        assert [seen.ident for seen in server.ask("seen")] != _IDENTS
        strangers.mesh.unenroll(client)
        (answer,) = silent.wait()
        assert build.rcode(answer.message) == SERVFAIL
        client.run(resolver.ask, address, *_QUERIES)
        assert [seen.ident for seen in server.ask("seen")] == _IDENTS
        strangers.server.run(resolver.ask, address, *_QUERIES)
        assert [seen.ident for seen in server.ask("seen")] != _IDENTS


def test_both_pods_are_served_again_after_agent_and_proxy_were_killed(
    strangers: Pair, family: str
) -> None:
    strangers.enroll()
    address = resolver_of(strangers, family)
    with serve(strangers) as server:
        for _ in range(2):
            for pod in (strangers.client, strangers.server):
                answers = pod.run(resolver.ask, address, *_QUERIES)
                assert [answer.message for answer in answers] == list(
                    map(build.answer_to, _QUERIES)
                )
                assert [seen.ident for seen in server.ask("seen")] != _IDENTS
            strangers.mesh.kill()
            strangers.mesh.start()
            for pod in (strangers.client, strangers.server):
                strangers.mesh.wait_until(lambda: is_answered(pod, address), "answer")  # noqa: B023 - called at once
            server.ask("seen")


def test_a_resolver_that_is_asked_from_before_the_enrolment(strangers: Pair, family: str) -> None:
    """Its socket goes on by the proxy, or is ended; nothing of it gets out by itself."""
    client, address = strangers.client, resolver_of(strangers, family)
    with serve(strangers) as server, client.spawn(resolver.keep_asking, address) as older:
        assert older.receive() == "ready"
        assert older.ask(_QUERIES[0]) == _ANSWERS[0]
        assert [seen.ident for seen in server.ask("seen")] == [_IDENTS[0]]
        strangers.enroll()
        goes_on = strangers.backend != "bpf"
        answer = older.ask(_QUERIES[1])
        assert answer == _ANSWERS[1] if goes_on else answer in _ENDED
        assert is_answered(client, address)
        idents = [seen.ident for seen in server.ask("seen")]
        assert len(idents) == 1 + goes_on
        assert _IDENTS[1] not in idents
