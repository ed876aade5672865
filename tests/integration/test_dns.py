"""DNS of two enrolled pods, asked of a resolver outside the mesh through the proxy's forwarder."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pyambient.dns.message import SERVFAIL
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import QUERIES_IN_FLIGHT
from tests.bed import Child, apps
from tests.dns import build

from . import resolver
from .conftest import Pair
from .resolver import Answered, Seen

pytestmark = pytest.mark.parametrize(
    "backend", ["bpf", "tc", "nftables", "iptables"], scope="module"
)
_IDENTS = range(0x4000, 0x4014)


@pytest.fixture
def server(pair: Pair) -> Iterator[Child]:
    """The resolver, in the pod that is not enrolled."""
    with pair.outside.spawn(resolver.resolver, uid=0, gid=0) as child:
        assert child.receive() == "listening"
        yield child


@pytest.fixture
def address(pair: Pair, family: str) -> SocketAddress:
    return SocketAddress(pair.outside.address(family), resolver.PORT)


@pytest.mark.parametrize("how", ["unconnected", "connected"])
def test_apps_of_both_pods_get_the_answers_of_the_resolver_they_ask(
    pair: Pair, server: Child, address: SocketAddress, family: str, how: str
) -> None:
    """It sees each pod by its own address, with ids and ports that are not the app's."""
    queries = [build.query(ident) for ident in _IDENTS]
    for pod in (pair.client, pair.server):
        answers = pod.run(resolver.ask, address, *queries, connected=how == "connected")
        assert answers == [Answered(build.answer_to(query), address) for query in queries]
        seen: list[Seen] = server.ask("seen")
        assert {one.peer.ip for one in seen} == {pod.address(family)}
        assert len({one.peer.port for one in seen}) > len(_IDENTS) / 2
        assert [one.ident for one in seen] != list(_IDENTS)


def test_status_counts_each_pods_queries(
    pair: Pair, server: Child, address: SocketAddress, family: str
) -> None:
    """Answered ones and malformed ones of one pod; the other's numbers stay."""

    def counted() -> dict[str, dict[str, int]]:
        return {pod["name"]: pod["proxy"]["dns"] for pod in pair.mesh.status()["pods"]}

    before = counted()
    queries = [build.query(ident) for ident in _IDENTS]
    two_questions = queries[0][:4] + b"\0\2" + queries[0][6:]
    pair.client.run(resolver.ask, address, two_questions, *queries)
    after = counted()
    assert after["server"] == before["server"]
    added = {name: count - before["client"][name] for name, count in after["client"].items()}
    expected = {"queries": len(queries), "answered": len(queries), "malformed": 1}
    assert {name: count for name, count in added.items() if count} == expected


def test_a_connection_carries_several_queries(
    pair: Pair, server: Child, address: SocketAddress, family: str
) -> None:
    queries = [build.query(ident, "big.example.com") for ident in _IDENTS]
    for pod in (pair.client, pair.server):
        answers = pod.run(resolver.ask_over_tcp, address, *queries)
        assert answers == [build.answer_to(query, padding=resolver.LONG) for query in queries]
        seen: list[Seen] = server.ask("seen")
        assert len(seen) == len(queries)
        assert {(one.transport, one.peer.ip) for one in seen} == {("tcp", pod.address(family))}
        assert [one.ident for one in seen] != list(_IDENTS)


def test_a_truncated_answer_is_one_and_the_whole_comes_over_tcp(
    pair: Pair, server: Child, address: SocketAddress
) -> None:
    query = build.query(text="big.example.com")
    (answer,) = pair.client.run(resolver.ask, address, query)
    assert answer.message[2] & 2
    (whole,) = pair.client.run(resolver.ask_over_tcp, address, query)
    assert whole == build.answer_to(query, padding=resolver.LONG)


def test_forged_answers_do_not_reach_the_app(
    pair: Pair, server: Child, address: SocketAddress
) -> None:
    query = build.query(text="forged.example.com")
    assert pair.client.run(resolver.ask, address, query) == [
        Answered(build.answer_to(query), address)
    ]


def test_a_resolver_that_is_away_is_servfail_over_udp_and_tcp(pair: Pair, family: str) -> None:
    address = SocketAddress(pair.outside.address(family), resolver.PORT)
    (answer,) = pair.client.run(resolver.ask, address, build.query())
    assert (build.rcode(answer.message), answer.sender) == (SERVFAIL, address)
    (over_tcp,) = pair.client.run(resolver.ask_over_tcp, address, build.query())
    assert build.rcode(over_tcp) == SERVFAIL


def test_a_resolver_that_is_silent_is_servfail_in_the_end(
    pair: Pair, server: Child, address: SocketAddress
) -> None:
    query = build.query(text="silent.example.com")
    (answer,) = pair.client.run(resolver.ask, address, query)
    assert build.rcode(answer.message) == SERVFAIL


def test_a_pod_that_floods_the_forwarder_keeps_nobody_out(
    pair: Pair, server: Child, address: SocketAddress, family: str
) -> None:
    """It asks all the time, for more than may be in flight; the other's are all answered.

    The flood asks a resolver of its own that reads nothing: what drowns must be the forwarder.
    """
    flooded = SocketAddress(pair.bed.node.address(family), resolver.PORT)
    with (
        apps.listener(flooded.port, flooded.ip, socket.SOCK_DGRAM),
        pair.client.spawn(resolver.flood, flooded, QUERIES_IN_FLIGHT + 1000) as flooding,
    ):
        assert flooding.receive() == "flooded"
        queries = [build.query(ident) for ident in _IDENTS]
        answers = pair.server.run(resolver.ask, address, *queries)
    assert [answer.message for answer in answers] == list(map(build.answer_to, queries))
