"""Where a captured outbound connection goes, and why.

In order: a call to our own ports is refused; an address of a workload goes to that workload,
through its waypoint if it has one; a VIP goes to the service's waypoint or to one of its endpoints;
everything else leaves the mesh as it is. A workload that speaks HBONE is reached through a tunnel,
one that does not in plain TCP.

The authority shown to a workload is its own address and target port; the one shown to a waypoint
is what the client asked for, because choosing the endpoint is the waypoint's job.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from pyambient.model.address import SocketAddress, is_loopback
from pyambient.model.numbers import HBONE_PORT
from pyambient.model.ports import WELL_KNOWN
from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import (
    GatewayAddress,
    LoadBalancerMode,
    NetworkAddress,
    Service,
    TunnelProtocol,
    Workload,
)

from .balance import Candidate, Candidates, Choose, candidates, only
from .snapshot import Snapshot

SELF_CALL = "attempted recursive call to ourselves"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """HBONE to `next_hop`: CONNECT `authority`, if the server proves to be one of `expected`.

    `target` is where the tunnel's end connects to; None where a waypoint decides that.
    """

    next_hop: SocketAddress
    authority: str
    expected: frozenset[SpiffeId]
    workload: Workload
    service: Service | None
    why: str
    target: SocketAddress | None = None


@dataclass(frozen=True, slots=True)
class Plain:
    """TCP to `address`; outside the mesh if `workload` is None."""

    address: SocketAddress
    workload: Workload | None
    service: Service | None
    why: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """No connection; `reason` is the access log's error."""

    reason: str

    @property
    def why(self) -> str:
        return self.reason


Route = Tunnel | Plain | Refuse


@dataclass(slots=True)
class _Question:
    """One connection to decide on, in the mesh as it is now."""

    snapshot: Snapshot
    source: Workload
    destination: SocketAddress
    choose: Choose


def decide_outbound(
    snapshot: Snapshot,
    source: Workload,
    destination: SocketAddress,
    choose: Choose = random.randrange,
    loops: tuple[int, ...] = WELL_KNOWN.loops,
) -> Route:
    """The route of a connection from the local workload `source` to `destination`.

    `loops` are the proxy's own ports in the pod of the source.
    """
    ip, port = destination
    if port in loops and (is_loopback(ip) or ip in source.addresses):
        return Refuse(SELF_CALL)
    asked = ("outbound", source.uid, destination)
    known: Route | None = snapshot.memo.get(asked)
    if known is not None:
        return known
    question = _Question(snapshot, source, destination, choose)
    workload = snapshot.workload_by_address(source.network, ip)
    if workload is not None:
        route = _to_workload(question, workload)
        # A waypoint's instance is chosen anew each time.
        return route if workload.waypoint else snapshot.remember(asked, route)
    service = snapshot.service_by_address(source.network, ip, source.namespace)
    if service is not None:
        return _to_service(question, service)
    outside = Plain(destination, None, None, "no workload and no service has this address")
    return snapshot.remember(asked, outside)


def _to_workload(question: _Question, workload: Workload) -> Route:
    waypoint = workload.waypoint
    if waypoint is not None and not _comes_from(question, waypoint):
        return _to_waypoint(question, waypoint, None)
    found = only(workload, question.destination.port, question.source)
    return _direct(question, found.members[0], None)


def _to_service(question: _Question, service: Service) -> Route:
    destination = question.destination
    waypoint = _waypoint_of(service, question.choose)
    if waypoint is not None and not _comes_from(question, waypoint):
        return _to_waypoint(question, waypoint, service)
    if service.balancing is LoadBalancerMode.PASSTHROUGH:
        return Plain(destination, None, None, f"service {service} passes connections through")
    found = candidates(question.snapshot, service, destination.port, question.source)
    candidate = found.pick(question.choose)
    if candidate is None:
        return Refuse(f"no healthy upstream: {destination} ({found.problem})")
    return _direct(question, candidate, service)


def _direct(question: _Question, candidate: Candidate, service: Service | None) -> Route:
    """To the workload itself: by tunnel if it speaks HBONE."""
    workload = candidate.workload
    ip = candidate.address_for(question.destination.ip)
    target = SocketAddress(ip, candidate.port)
    how = "is an endpoint of the service" if service else "has this address"
    if workload.protocol is TunnelProtocol.NONE:
        why = f"workload {workload} {how} and does not speak HBONE"
        return Plain(target, workload, service, why)
    why = f"workload {workload} {how} and speaks HBONE"
    next_hop = SocketAddress(ip, HBONE_PORT)
    return Tunnel(next_hop, str(target), candidate.expected, workload, service, why, target)


def _waypoint_of(service: Service, choose: Choose) -> GatewayAddress | None:
    """The service's waypoint; one of several by weight."""
    total = sum(w.weight for w in service.weighted_waypoints)
    if total == 0:
        return service.waypoint
    drawn = choose(total)
    sums = itertools.accumulate(w.weight for w in service.weighted_waypoints)
    return next(
        w.gateway for w, upto in zip(service.weighted_waypoints, sums, strict=True) if drawn < upto
    )


def _comes_from(question: _Question, waypoint: GatewayAddress) -> bool:
    """Whether the source is an instance of the waypoint: its own traffic passed it already."""
    source = question.source
    instances = question.snapshot.gateway_instances(waypoint, source.namespace)
    return any(instance.uid == source.uid for instance in instances)


def _to_waypoint(question: _Question, waypoint: GatewayAddress, service: Service | None) -> Route:
    """A tunnel to an instance of the waypoint; refused, never led past it, if there is none."""
    found = _instances(question, waypoint)
    candidate = found.pick(question.choose)
    if candidate is None:
        return Refuse(f"unknown waypoint: {waypoint} ({found.problem})")
    named = waypoint.destination
    asked = named.ip if isinstance(named, NetworkAddress) else question.destination.ip
    next_hop = SocketAddress(candidate.address_for(asked), candidate.port)
    authority = str(question.destination)
    why = f"{service or 'the workload'} has waypoint {waypoint}"
    return Tunnel(next_hop, authority, candidate.expected, candidate.workload, service, why)


def _instances(question: _Question, waypoint: GatewayAddress) -> Candidates:
    source, port = question.source, waypoint.hbone_port
    named = question.snapshot.gateway(waypoint, source.namespace)
    if named is None:
        return Candidates((), (), "no service and no workload is called so")
    if isinstance(named, Service):
        return candidates(question.snapshot, named, port, source, waypoint=True)
    return only(named, port, source)
