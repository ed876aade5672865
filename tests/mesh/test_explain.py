"""Why the mesh sends a connection where it does: findings, and the outcome of the deciders."""

from __future__ import annotations

import pytest

from pyambient.mesh.explain import explain_inbound, explain_outbound
from pyambient.mesh.inbound import Accept, Entrance, decide_inbound, decide_plaintext
from pyambient.mesh.route import Plain, Refuse, Tunnel, decide_outbound
from pyambient.mesh.snapshot import Snapshot
from pyambient.model.address import SocketAddress
from pyambient.model.explained import MOST_FINDINGS, Explanation, Outcome
from pyambient.model.policy import Action, Match, MatchKind, Policy, Scope, StringMatch
from pyambient.zds.details import Answer, encode_answer
from tests.mesh.build import policy, spiffe, workload
from tests.mesh.test_route import CLIENT, MESH

OUTCOMES = {Tunnel: Outcome.TUNNELLED, Plain: Outcome.PLAIN, Refuse: Outcome.REFUSED}
EVERY_KIND = [
    *(f"10.0.0.{n}" for n in (1, 20, 21, 22, 23, 24, 25, 30)),
    *(f"10.96.0.{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 99)),
    *("fd00::20", "fd96::1", "192.0.2.1", "2001:db8::1"),
]
OWN = workload("own", "10.1.1.1", "fd01::1")
PEER = workload("peer", "10.1.1.2")


def found(explained: Explanation) -> dict[str, tuple[bool, str]]:
    return {f.rule: (f.matched, f.found) for f in explained.findings}


@pytest.mark.parametrize("port", [80, 81, 15008])
@pytest.mark.parametrize("ip", EVERY_KIND)
def test_the_outcome_is_the_routes(ip: str, port: int) -> None:
    """For every kind of destination; the last finding is the route's own reason."""
    to = SocketAddress(ip, port)
    route = decide_outbound(MESH, CLIENT, to)
    explained = explain_outbound(MESH, CLIENT, to)
    assert explained.outcome is OUTCOMES[type(route)]
    assert explained.findings[-1].rule == "decision"
    assert explained.findings[-1].matched is not isinstance(route, Refuse)


@pytest.mark.parametrize(
    ("ip", "port", "rule", "matched", "words"),
    [
        ("10.0.0.20", 80, "workload", True, "10.0.0.20 is default/server, which speaks HBONE"),
        ("10.0.0.20", 80, "waypoint", False, "default/server has none"),
        ("10.0.0.20", 80, "identity", True, str(spiffe("server"))),
        ("10.0.0.21", 80, "workload", True, "10.0.0.21 is default/plain, without HBONE"),
        ("10.0.0.22", 80, "waypoint", True, "default/shy has default/waypoint"),
        ("192.0.2.1", 80, "workload", False, "none has the address 192.0.2.1"),
        ("192.0.2.1", 80, "service", False, "none that default may see"),
        ("10.96.0.1", 80, "service", True, "default/web.default.svc.cluster.local, ports 80"),
        ("10.96.0.1", 80, "endpoints", True, "1 of 1 may take it, by chance: default/server"),
        ("10.96.0.1", 81, "endpoints", False, "has no port 81"),
        ("10.96.0.1", 80, "identity", True, f"{spiffe('server')} or {spiffe('shared')}"),
        ("10.96.0.3", 80, "decision", False, "no healthy upstream"),
        ("10.96.0.4", 80, "waypoint", True, "has default/waypoint"),
        ("10.96.0.5", 80, "decision", False, "unknown waypoint"),
    ],
)
def test_each_rule_is_found(ip: str, port: int, rule: str, *, matched: bool, words: str) -> None:
    """Whether it matched, and what it was asked about."""
    explained = explain_outbound(MESH, CLIENT, SocketAddress(ip, port))
    was, says = found(explained)[rule]
    assert was is matched
    assert words in says


def principal(name: str) -> StringMatch:
    return StringMatch(MatchKind.EXACT, spiffe(name).principal)


DENY_PORT = policy("no-admin", Match(destination_ports=(9000,)), action=Action.DENY)
ALLOW_PEER = policy("peers", Match(principals=(principal("peer"),), destination_ports=(80, 9000)))
NEVER = policy("never", rules=())
DRY = policy("dry", Match(destination_ports=(80,)), action=Action.DENY, dry_run=True)
POLICIES = (DRY, ALLOW_PEER, NEVER, DENY_PORT)


@pytest.mark.parametrize("port", [80, 81, 9000])
@pytest.mark.parametrize("source", ["10.1.1.2", "10.9.9.9"])
@pytest.mark.parametrize("policies", [(), POLICIES, (DENY_PORT,), (DRY,)])
def test_the_verdict_is_that_of_the_decider(
    policies: tuple[Policy, ...], source: str, port: int
) -> None:
    """Of a client in the mesh as of a tunnel with its identity, of another one as of plain TCP."""
    mesh = Snapshot([OWN, PEER], [], policies)
    peer, to = SocketAddress(source, 0), SocketAddress("10.1.1.1", port)
    explained = explain_inbound(mesh, OWN, OWN.addresses, peer, to)
    if source == "10.1.1.2":
        decision = decide_inbound(str(to), Entrance(to.ip), OWN, mesh, peer, PEER.identity)
    else:
        decision = decide_plaintext(to, OWN.addresses, OWN, mesh, peer)
    accepted = isinstance(decision, Accept)
    assert explained.outcome is (Outcome.ACCEPTED if accepted else Outcome.REFUSED)
    assert explained.summary == decision.why


def test_policies_are_asked_one_by_one() -> None:
    """DENY first, dry run last; of what does not match, the fields that do not hold are named."""
    mesh = Snapshot([OWN, PEER], [], POLICIES)
    to = SocketAddress("10.1.1.1", 80)
    explained = explain_inbound(mesh, OWN, OWN.addresses, SocketAddress("10.9.9.9", 0), to)
    asked = [(f.rule, f.matched, f.found) for f in explained.findings[1:-1]]
    assert asked == [
        ("Deny policy default/no-admin", False, "rule 1 by its destination_ports"),
        ("Allow policy default/peers", False, "rule 1 by its principals"),
        ("Allow policy default/never", False, "it has no rules, so it never matches"),
        ("Deny policy default/dry in dry run", True, "a rule matches"),
    ]


def test_thousands_of_policies_are_cut_short() -> None:
    """The answer fits a packet: the first ones, how many are left out, and the decision."""
    many = [policy(f"\u00fc{n}" * 99, scope=Scope.GLOBAL) for n in range(3000)]
    mesh = Snapshot([OWN], [], many)
    to = SocketAddress("10.1.1.1", 80)
    explained = explain_inbound(mesh, OWN, OWN.addresses, SocketAddress("10.9.9.9", 0), to)
    assert len(explained.findings) == MOST_FINDINGS
    encode_answer(Answer(1, explained.to_json()))
    assert explained.findings[-1].rule == "decision"
    assert explained.findings[-2].found == f"{3002 - (MOST_FINDINGS - 1)} are left out here"


def test_an_explanation_survives_its_journey() -> None:
    """What the proxy sends is what the agent reads."""
    explained = explain_outbound(MESH, CLIENT, SocketAddress("10.96.0.1", 80))
    assert Explanation.from_json(explained.to_json()) == explained
