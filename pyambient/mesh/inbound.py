"""Whether a connection that arrives at a pod may go on to the application, and why.

A tunnel asks by its CONNECT authority; the answer's status is that of ztunnel. A plaintext
connection has no one to answer to: there `status` only tells kinds of refusal apart, in the same
numbers. Policies see the real target port and, of a tunnel, the identity its client proved.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

from pyambient.model.address import HostPort, SocketAddress, is_loopback, parse_authority
from pyambient.model.policy import ConnectionFacts, Verdict
from pyambient.model.ports import WELL_KNOWN
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import Service, Workload

from .authorize import authorize
from .balance import target_port
from .route import SELF_CALL
from .snapshot import Snapshot

# An authority in a log line: enough to recognise it, too short to drown the rest.
_SHOWN = 80
_UNKNOWN = "failed to fetch information about local workload"


@dataclass(frozen=True, slots=True)
class Accept:
    """Connect to `target`; `facts` are what policies were asked with, to ask them again later."""

    target: SocketAddress
    service: Service | None
    facts: ConnectionFacts
    why: str


@dataclass(frozen=True, slots=True)
class Reject:
    """No connection; `reason` is the access log's error. 401 is a policy's refusal."""

    status: int
    reason: str

    @property
    def why(self) -> str:
        return self.reason


Decision = Accept | Reject


class Entrance(NamedTuple):
    """The address of the pod that a client reached, and the proxy's own ports in there."""

    ip: str
    loops: tuple[int, ...] = WELL_KNOWN.loops


def decide_inbound(
    authority: str,
    at: Entrance,
    own: Workload | None,
    snapshot: Snapshot,
    peer: SocketAddress,
    identity: SpiffeId | None,
    host: str | None = None,
) -> Decision:
    """Judge a CONNECT to `authority` on a tunnel that `peer` opened to this entrance.

    `own` is the pod's workload, None while it is unknown. `host` is what the client's `forwarded`
    header calls the service; it is believed if `own` is behind such a service.
    """
    uid = None if own is None else own.uid
    question = ("inbound", authority, at, uid, peer, identity, host)
    known: Decision | None = snapshot.memo.get(question)
    if known is not None:
        return known
    decision = _decide(authority, at, own, snapshot, peer, identity, host)
    # What is refused may be anything, of any length: a peer must not fill the memo with it.
    return snapshot.remember(question, decision) if isinstance(decision, Accept) else decision


def _decide(
    authority: str,
    at: Entrance,
    own: Workload | None,
    snapshot: Snapshot,
    peer: SocketAddress,
    identity: SpiffeId | None,
    host: str | None,
) -> Decision:
    try:
        asked = parse_authority(authority)
    except ValueError:
        return Reject(HTTPStatus.BAD_REQUEST, f"invalid CONNECT address {authority[:_SHOWN]!r}")
    if own is None:
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, _UNKNOWN)
    if own.application_tunnel is not None:
        why = f"unsupported feature: application tunnel of workload {own}"
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, why)
    if isinstance(asked, HostPort):
        found = _by_name(asked, own, snapshot)
    elif asked.ip in (at.ip, at.ip.partition("%")[0]):
        found = asked.port, _service_at(asked.port, host, own, snapshot)
    else:
        return Reject(HTTPStatus.BAD_REQUEST, f"ip mismatch: {at.ip} != {asked.ip}")
    if isinstance(found, Reject):
        return found
    port, service = found
    facts = ConnectionFacts(peer, SocketAddress(at.ip, port), identity)
    return _judge(facts, own, snapshot, service, at.loops)


def decide_plaintext(
    destination: SocketAddress,
    own_addresses: Collection[str],
    own: Workload | None,
    snapshot: Snapshot,
    peer: SocketAddress,
    loops: tuple[int, ...] = WELL_KNOWN.loops,
) -> Decision:
    """Judge a connection of `peer` that came to 15006 and was going to `destination`.

    Just an address of the pod itself will do: an application that translates addresses could
    otherwise make the proxy connect where the application itself may not.
    """
    ip, port = destination
    if port in loops:
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, SELF_CALL)
    if ip not in own_addresses or is_loopback(ip):
        reason = f"destination {destination} is not an address of this pod"
        return Reject(HTTPStatus.BAD_REQUEST, reason)
    if own is None:
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, _UNKNOWN)
    facts = ConnectionFacts(peer, destination, None)
    return _judge(facts, own, snapshot, _service_at(port, None, own, snapshot), loops)


def _by_name(
    asked: HostPort, own: Workload, snapshot: Snapshot
) -> tuple[int, Service | None] | Reject:
    """The service of that name and the pod's port for it; the address stays the pod's own."""
    service = snapshot.service_by_hostname(asked.host, own.namespace)
    if service is None:
        reason = f"no service or workload for hostname: {asked.host}"
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, reason)
    port = target_port(service, own, asked.port)
    if not port:
        reason = f"requested service {asked} found, but cannot resolve port"
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, reason)
    return port, service


def _service_at(port: int, host: str | None, own: Workload, snapshot: Snapshot) -> Service | None:
    """Which of the pod's services a connection to `port` is for: the one its client named first."""
    services = snapshot.services_of(own) if own.services else ()
    named = (s for s in services if s.hostname == host)
    serving = (s for s in services if any(target_port(s, own, known) == port for known in s.ports))
    return next(named, None) or next(serving, None)


def _judge(
    facts: ConnectionFacts,
    own: Workload,
    snapshot: Snapshot,
    service: Service | None,
    loops: tuple[int, ...],
) -> Decision:
    if facts.destination.port in loops:
        return Reject(HTTPStatus.SERVICE_UNAVAILABLE, SELF_CALL)
    verdict = authorize(snapshot.policies_for(own), facts)
    if not verdict.allowed:
        reason = f"connection closed due to policy rejection: {verdict.reason}"
        return Reject(HTTPStatus.UNAUTHORIZED, reason)
    return Accept(facts.destination, service, facts, _why(verdict, own, snapshot))


def _why(verdict: Verdict, own: Workload, snapshot: Snapshot) -> str:
    unknown = snapshot.unknown_policies(own)
    skipped = (f"policy {name} is not defined and was skipped" for name in unknown)
    return "; ".join((verdict.reason, *verdict.notes, *skipped))
