"""Why a captured connection goes where it goes: `route` and `inbound`, rule by rule.

Pure functions of the snapshot. The outcome is what `decide_outbound`, `decide_inbound` and
`decide_plaintext` say; the findings before it ask what these ask, in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from typing import Final

from pyambient.model.address import SocketAddress
from pyambient.model.explained import End, Explanation, Finding, Outcome, Ruled
from pyambient.model.numbers import HBONE_PORT
from pyambient.model.policy import Action, ConnectionFacts, Match, Policy
from pyambient.model.ports import WELL_KNOWN
from pyambient.model.workload import Service, TunnelProtocol, Workload

from .authorize import match_holds, policy_matches
from .balance import candidates
from .inbound import Accept, Entrance, decide_inbound, decide_plaintext
from .route import Plain, Refuse, Route, Tunnel, decide_outbound
from .snapshot import Snapshot

_MOST_NAMED: Final = 8
_ORDER: Final = {Action.DENY: 0, Action.ALLOW: 1}


def explain_outbound(
    snapshot: Snapshot,
    own: Workload,
    to: SocketAddress,
    nearby: Callable[[Tunnel], str] = lambda _: "",
    loops: tuple[int, ...] = WELL_KNOWN.loops,
) -> Explanation:
    """A connection that the proxy took from an app of `own`, and that was going to `to`.

    `nearby` names the pod that is reached without the tunnel, if one is. `loops` are the proxy's
    own ports in the pod.
    """
    return Explanation.of(_outbound(snapshot, own, to, nearby, loops))


def _outbound(
    snapshot: Snapshot,
    own: Workload,
    to: SocketAddress,
    nearby: Callable[[Tunnel], str],
    loops: tuple[int, ...],
) -> Iterator[Ruled]:
    if to.port in loops:
        yield Finding("the proxy's ports", True, f"{to.port} is one, fine elsewhere"), None
    workload = snapshot.workload_by_address(own.network, to.ip)
    if workload is not None:
        yield Finding("workload", True, f"{to.ip} is {workload}, {_speaks(workload)}"), None
        waypoint = workload.waypoint
        yield _waypoint(str(workload), "" if waypoint is None else str(waypoint)), None
    else:
        yield Finding("workload", False, f"none has the address {to.ip}"), None
        yield from _service(snapshot, own, to)
    route = decide_outbound(snapshot, own, to, loops=loops)
    if isinstance(route, Tunnel):
        expected = " or ".join(sorted(map(str, route.expected)))
        yield Finding("identity", True, f"the server has to prove that it is {expected}"), None
        if pod := nearby(route):
            yield _same_node(pod, route)
    yield Finding("decision", not isinstance(route, Refuse), route.why), _end(route)


def _same_node(pod: str, route: Tunnel) -> Ruled:
    found = f"{pod} is a pod of this proxy: its policies decide, and there is no TLS"
    summary = f"the proxy connects to {route.target} inside {pod}, if its policies let it in"
    return Finding("same node", True, found), End(Outcome.SAME_NODE, summary)


def _speaks(workload: Workload) -> str:
    return "which speaks HBONE" if workload.protocol is TunnelProtocol.HBONE else "without HBONE"


def _waypoint(whose: str, waypoint: str) -> Finding:
    if waypoint:
        return Finding("waypoint", True, f"{whose} has {waypoint}")
    return Finding("waypoint", False, f"{whose} has none")


def _service(snapshot: Snapshot, own: Workload, to: SocketAddress) -> Iterator[Ruled]:
    service = snapshot.service_by_address(own.network, to.ip, own.namespace)
    if service is None:
        found = f"none that {own.namespace} may see has the address {to.ip}"
        yield Finding("service", False, found), None
        return
    ports = " ".join(map(str, service.ports))
    yield Finding("service", True, f"{to.ip} is {service}, ports {ports}"), None
    named = [str(w.gateway) for w in service.weighted_waypoints if w.weight]
    named = named or [str(service.waypoint)] * (service.waypoint is not None)
    yield _waypoint(str(service), " or ".join(named)), None
    if not named:
        yield _endpoints(snapshot, service, own, to.port), None


def _endpoints(snapshot: Snapshot, service: Service, own: Workload, port: int) -> Finding:
    found = candidates(snapshot, service, port, own)
    if not found.members:
        return Finding("endpoints", False, found.problem)
    names = _some([f"{m.workload} ({_speaks(m.workload)})" for m in found.members])
    of_all = f"{len(found.members)} of {len(snapshot.endpoints(service))} may take it"
    return Finding("endpoints", True, f"{of_all}, by chance: {names}")


def _end(route: Route) -> End:
    match route:
        case Tunnel(next_hop, authority):
            summary = f"mutual TLS to {next_hop}, CONNECT {authority}"
            return End(Outcome.TUNNELLED, summary)
        case Plain(address):
            return End(Outcome.PLAIN, f"the proxy connects to {address} in plain TCP")
        case Refuse(reason):
            return End(Outcome.REFUSED, reason)


def explain_inbound(
    snapshot: Snapshot,
    own: Workload,
    own_addresses: Collection[str],
    source: SocketAddress,
    to: SocketAddress,
    loops: tuple[int, ...] = WELL_KNOWN.loops,
) -> Explanation:
    """A connection of `source` to `to`, an address of the pod `own`.

    It comes by HBONE if the mesh knows its source as a workload that speaks it, else in plain TCP.
    """
    client = snapshot.workload_by_address(own.network, source.ip)
    by_tunnel = client is not None and client.protocol is TunnelProtocol.HBONE
    identity = client.identity if client is not None and by_tunnel else None
    facts = ConnectionFacts(source, to, identity)
    return Explanation.of(_inbound(snapshot, own, own_addresses, client, facts, loops))


def _inbound(
    snapshot: Snapshot,
    own: Workload,
    own_addresses: Collection[str],
    client: Workload | None,
    facts: ConnectionFacts,
    loops: tuple[int, ...],
) -> Iterator[Ruled]:
    yield _client(client, facts), None
    for policy in sorted(snapshot.policies_for(own), key=_asked_when):
        yield _policy(policy, facts), None
    for name in snapshot.unknown_policies(own):
        yield Finding(f"policy {name}", False, "it is not defined, and skipped"), None
    to, peer = facts.destination, facts.source
    if facts.identity is None:
        decision = decide_plaintext(to, own_addresses, own, snapshot, peer, loops)
    else:
        at = Entrance(to.ip, loops)
        decision = decide_inbound(str(to), at, own, snapshot, peer, facts.identity)
    accepted = isinstance(decision, Accept)
    end = End(Outcome.ACCEPTED if accepted else Outcome.REFUSED, decision.why)
    yield Finding("decision", accepted, decision.why), end


def _client(client: Workload | None, facts: ConnectionFacts) -> Finding:
    ip, who = facts.source.ip, facts.identity
    if client is None:
        return Finding("client", False, f"no workload has {ip}: plain TCP, without an identity")
    if who is None:
        return Finding("client", False, f"{ip} is {client}: plain TCP, without an identity")
    return Finding("client", True, f"{ip} is {client}: by HBONE to {HBONE_PORT}, as {who}")


def _asked_when(policy: Policy) -> tuple[bool, int]:
    """DENY before ALLOW, and last what is in dry run and decides nothing."""
    return (policy.dry_run, _ORDER[policy.action])


def _policy(policy: Policy, facts: ConnectionFacts) -> Finding:
    mode = " in dry run" if policy.dry_run else ""
    rule = f"{policy.action.value} policy {policy.key}{mode}"
    if policy_matches(policy, facts):
        return Finding(rule, True, "a rule matches")
    if not policy.rules:
        return Finding(rule, False, "it has no rules, so it never matches")
    return Finding(rule, False, _some(list(_unmet(policy, facts))))


def _unmet(policy: Policy, facts: ConnectionFacts) -> Iterator[str]:
    """What does not hold, of the first clause of each rule that does not."""
    for number, rule in enumerate(policy.rules, 1):
        for clause in rule:
            if clause and not any(match_holds(match, facts) for match in clause):
                unmet = (name for match in clause for name in _fields_unmet(match, facts))
                yield f"rule {number} by its {', '.join(dict.fromkeys(unmet)) or 'empty match'}"
                break


def _fields_unmet(match: Match, facts: ConnectionFacts) -> Iterator[str]:
    """A match is all of its fields: each is asked as if it were the only one."""
    for field in fields(Match):
        value = getattr(match, field.name)
        if value and not match_holds(Match(**{field.name: value}), facts):
            yield field.name


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - _MOST_NAMED} more" if len(texts) > _MOST_NAMED else ""
    return "; ".join(texts[:_MOST_NAMED]) + more
