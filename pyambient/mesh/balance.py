"""Which endpoint of a service takes a connection.

General theory of operation
---------------------------
Endpoints are filtered (healthy, in reach, able to serve the port, with an address of the service's
IP families), ranked by the service's routing preferences, and one of those left is picked at
random, weighted by capacity. All but the pick is the same for every connection from one place to
one port, so it is computed once per snapshot and kept in its memo. What can be kept there is
bounded by the ports that services define and the places that local pods are in: a port that no
service defines is answered without keeping anything.
"""

from __future__ import annotations

import itertools
from bisect import bisect
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from pyambient.model.spiffe import SpiffeId
from pyambient.model.workload import (
    HealthStatus,
    LoadBalancerMode,
    RoutingScope,
    Service,
    Workload,
)

from .snapshot import Snapshot

_IN_REACH = "on the client's network, and tunnels through network gateways are not supported"
# choose(n) gives a number from 0 to n - 1: random.randrange, or what a test wants to see chosen.
Choose = Callable[[int], int]

_IN_COMMON: dict[RoutingScope, Callable[[Workload], str]] = {
    RoutingScope.NETWORK: lambda w: w.network,
    RoutingScope.REGION: lambda w: w.locality.region,
    RoutingScope.ZONE: lambda w: w.locality.zone,
    RoutingScope.SUBZONE: lambda w: w.locality.subzone,
    RoutingScope.NODE: lambda w: w.node,
    RoutingScope.CLUSTER: lambda w: w.cluster_id,
}


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint, where it may be reached, its own port, and who may answer there."""

    workload: Workload
    addresses: tuple[str, ...]
    port: int
    expected: frozenset[SpiffeId]

    def address_for(self, asked: str) -> str:
        """The endpoint's address for a client of `asked`: that one, or of its family, or any."""
        if asked in self.addresses:
            return asked
        ipv6 = ":" in asked
        return next((ip for ip in self.addresses if (":" in ip) is ipv6), self.addresses[0])


@dataclass(frozen=True, slots=True)
class Candidates:
    """The endpoints to pick from, their capacities summed up so far, or why there are none."""

    members: tuple[Candidate, ...]
    cumulated: tuple[int, ...]
    problem: str = ""

    def pick(self, choose: Choose) -> Candidate | None:
        """One of them, weighted by capacity."""
        if not self.members:
            return None
        return self.members[bisect(self.cumulated, choose(self.cumulated[-1]))]


def candidates(
    snapshot: Snapshot, service: Service, port: int, source: Workload, *, waypoint: bool = False
) -> Candidates:
    """The endpoints of `service` for a connection from `source` to service port `port`.

    A waypoint's own port need not be among its service's ports if its application tunnel takes
    all of them.
    """
    if port not in service.ports and not waypoint:
        return Candidates((), (), f"service {service} has no port {port}")
    key = (service.key, port, waypoint, _place(service, source))
    kept: Candidates | None = snapshot.memo.get(key)
    if kept is None:
        search = _Search(service, port, source, waypoint)
        snapshot.memo[key] = kept = search.run(snapshot.endpoints(service))
    return kept


def target_port(service: Service, workload: Workload, port: int) -> int:
    """The port that `workload` means by `port` of `service`; 0 if there is none."""
    own = workload.services.get(service.key)
    return (own.get(port) if own else None) or service.ports.get(port, 0)


def only(workload: Workload, port: int, source: Workload) -> Candidates:
    """A workload that is addressed itself, at its own port."""
    if workload.network != source.network:
        return Candidates((), (), f"workload {workload} is not {_IN_REACH}")
    if not workload.addresses:
        return Candidates((), (), f"workload {workload} has no address")
    expected = frozenset((workload.identity,))
    return Candidates((Candidate(workload, workload.addresses, port, expected),), (1,))


def _place(service: Service, source: Workload) -> Hashable:
    """What of a source decides its candidates."""
    if service.balancing is LoadBalancerMode.STANDARD:
        return source.network
    return (source.network, source.locality, source.node, source.cluster_id)


@dataclass(frozen=True, slots=True)
class _Search:
    """The filters and the ranking, for one service port and one source."""

    service: Service
    port: int
    source: Workload
    waypoint: bool

    def run(self, endpoints: Iterable[Workload]) -> Candidates:
        left = list(endpoints)
        if not left:
            return Candidates((), (), f"service {self.service} has no endpoints")
        for requirement, holds in self._filters():
            left = [w for w in left if holds(w)]
            if not left:
                problem = f"no endpoint of service {self.service} {requirement}"
                return Candidates((), (), problem)
        members = tuple(map(self._candidate, self._best_ranked(left)))
        return Candidates(
            members, tuple(itertools.accumulate(m.workload.capacity for m in members))
        )

    def _filters(self) -> tuple[tuple[str, Callable[[Workload], bool]], ...]:
        return (
            ("is healthy", self._usable),
            (f"is {_IN_REACH}", lambda w: w.network == self.source.network),
            (f"knows port {self.port}", lambda w: self._target_port(w) > 0),
            ("has an address of its IP families", lambda w: bool(self._addresses(w))),
            ("matches its routing preferences", self._matches),
            ("has a capacity above 0", lambda w: w.capacity > 0),
        )

    def _usable(self, workload: Workload) -> bool:
        return self.service.allow_unhealthy or workload.status is HealthStatus.HEALTHY

    def _target_port(self, workload: Workload) -> int:
        """As `target_port`; a waypoint whose application takes all ports takes any."""
        port = target_port(self.service, workload, self.port)
        tunnel = workload.application_tunnel
        if not port and self.waypoint and tunnel is not None and tunnel.port:
            return self.port
        return port

    def _addresses(self, workload: Workload) -> tuple[str, ...]:
        return tuple(filter(self.service.ip_families.accepts, workload.addresses))

    def _matches(self, workload: Workload) -> bool:
        """Strict preferences must all hold; those of other modes just rank."""
        strict = self.service.balancing is LoadBalancerMode.STRICT
        return not strict or self._rank(workload) == len(self.service.routing_preferences)

    def _best_ranked(self, endpoints: list[Workload]) -> list[Workload]:
        if self.service.balancing is LoadBalancerMode.STANDARD:
            return endpoints
        best = max(map(self._rank, endpoints))
        return [w for w in endpoints if self._rank(w) == best]

    def _rank(self, workload: Workload) -> int:
        """How many of the preferences, from the first on, source and endpoint have in common."""
        shared = itertools.takewhile(
            lambda scope: _IN_COMMON[scope](workload) == _IN_COMMON[scope](self.source),
            self.service.routing_preferences,
        )
        return sum(1 for _ in shared)

    def _candidate(self, workload: Workload) -> Candidate:
        expected = frozenset((workload.identity, *self.service.subject_alt_names))
        port, addresses = self._target_port(workload), self._addresses(workload)
        return Candidate(workload, addresses, port, expected)
