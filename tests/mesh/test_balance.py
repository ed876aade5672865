"""Which endpoints of a service are left, and which one is picked."""

from __future__ import annotations

import dataclasses

import pytest

from pyambient.mesh.balance import candidates, only, target_port
from pyambient.mesh.snapshot import Snapshot
from pyambient.model.workload import (
    ApplicationTunnel,
    HealthStatus,
    IpFamilies,
    LoadBalancerMode,
    Locality,
    RoutingScope,
    TunnelledProtocol,
)
from tests.mesh.build import behind, first, service, spiffe, workload

CLIENT = workload(
    "client", "10.0.0.1", node="n1", cluster_id="c1", locality=Locality("r1", "z1", "s1")
)
SICK = HealthStatus.UNHEALTHY
SERVICE = service("s")
NAMED_PORT = service("s", ports={80: 0})
V6_ONLY = service("s", ip_families=IpFamilies.IPV6)
STRICT = service("s", balancing=LoadBalancerMode.STRICT, routing_preferences=(RoutingScope.NODE,))


def endpoint(name, svc, *addresses, ports=None, **fields):
    return workload(
        name, *(addresses or ("10.0.1.1",)), services=behind(svc, ports=ports), **fields
    )


def found(svc, *endpoints, port=80, waypoint=False):
    """The candidates for CLIENT in a mesh of one service."""
    return candidates(Snapshot(endpoints, [svc]), svc, port, CLIENT, waypoint=waypoint)


def names(result):
    return [c.workload.name for c in result.members]


def test_healthy_endpoints_only():
    """An unhealthy endpoint takes no connection, unless the service allows it."""
    well, sick = endpoint("well", SERVICE), endpoint("sick", SERVICE, status=SICK)
    assert names(found(SERVICE, well, sick)) == ["well"]
    assert names(found(service("s", allow_unhealthy=True), well, sick)) == ["well", "sick"]


@pytest.mark.parametrize(
    ("svc", "endpoints", "port", "problem"),
    [
        (SERVICE, [], 80, "service default/s.default.svc.cluster.local has no endpoints"),
        (SERVICE, [{}], 81, "service default/s.default.svc.cluster.local has no port 81"),
        (SERVICE, [{"status": SICK}], 80, "is healthy"),
        (SERVICE, [{"status": SICK}, {"network": "far"}], 80, "network gateways are not supported"),
        (NAMED_PORT, [{}], 80, "knows port 80"),
        (V6_ONLY, [{}], 80, "has an address of its IP families"),
        (STRICT, [{"node": "n2"}], 80, "matches its routing preferences"),
        (SERVICE, [{"capacity": 0}], 80, "has a capacity above 0"),
    ],
)
def test_no_candidates(svc, endpoints, port, problem):
    """When no endpoint is left, the answer says which requirement none of them met."""
    result = found(svc, *(endpoint(f"e{i}", svc, **e) for i, e in enumerate(endpoints)), port=port)
    assert result.pick(first) is None
    assert result.problem.endswith(problem)


def test_endpoint_without_address():
    """An endpoint that is known by a host name only cannot be reached."""
    nameless = workload("e", hostname="e.example", services=behind(SERVICE))
    assert found(SERVICE, nameless).problem.endswith("has an address of its IP families")


NEAR = {"node": "n1", "cluster_id": "c1", "locality": Locality("r1", "z1", "s1")}
NEXT_ZONE = {"node": "n2", "cluster_id": "c1", "locality": Locality("r1", "z2", "s1")}
NEXT_REGION = {"node": "n3", "cluster_id": "c2", "locality": Locality("r2", "z1", "s1")}
FAILOVER = LoadBalancerMode.FAILOVER
SCOPES = RoutingScope


@pytest.mark.parametrize(
    ("mode", "preferences", "endpoints", "expected"),
    [
        (FAILOVER, [SCOPES.NODE], [NEAR, NEXT_ZONE], [0]),
        (FAILOVER, [SCOPES.NODE], [NEXT_ZONE, NEXT_REGION], [0, 1]),
        (FAILOVER, [SCOPES.CLUSTER], [NEAR, NEXT_ZONE, NEXT_REGION], [0, 1]),
        (FAILOVER, [SCOPES.REGION, SCOPES.ZONE], [NEXT_ZONE, NEXT_REGION], [0]),
        (FAILOVER, [SCOPES.REGION, SCOPES.ZONE], [NEAR, NEXT_ZONE, NEXT_REGION], [0]),
        (FAILOVER, [SCOPES.ZONE, SCOPES.REGION], [NEXT_ZONE, NEXT_REGION], [1]),
        (FAILOVER, [SCOPES.NETWORK, SCOPES.REGION, SCOPES.ZONE], [NEXT_ZONE, NEXT_REGION], [0]),
        (FAILOVER, [SCOPES.SUBZONE], [NEXT_ZONE, NEXT_REGION], [0, 1]),
        (FAILOVER, [], [NEAR, NEXT_REGION], [0, 1]),
        (LoadBalancerMode.STRICT, [SCOPES.REGION], [NEAR, NEXT_ZONE, NEXT_REGION], [0, 1]),
        (LoadBalancerMode.STRICT, [SCOPES.REGION, SCOPES.ZONE], [NEAR, NEXT_ZONE], [0]),
        (LoadBalancerMode.STANDARD, [SCOPES.NODE], [NEAR, NEXT_ZONE, NEXT_REGION], [0, 1, 2]),
    ],
)
def test_preferences(mode, preferences, endpoints, expected):
    """Strict keeps what matches all preferences, failover what matches most from the first on."""
    svc = service("s", balancing=mode, routing_preferences=tuple(preferences))
    made = [endpoint(f"e{i}", svc, **fields) for i, fields in enumerate(endpoints)]
    assert names(found(svc, *made)) == [f"e{i}" for i in expected]


@pytest.mark.parametrize(
    ("ports", "own", "expected"),
    [({80: 8080}, None, 8080), ({80: 8080}, {80: 9090}, 9090), ({80: 0}, {80: 9090}, 9090)],
)
def test_target_port(ports, own, expected):
    """An endpoint's own idea of a service port goes before the service's."""
    svc = service("s", ports=ports)
    [candidate] = found(svc, endpoint("e", svc, ports=own)).members
    assert candidate.port == expected


def test_target_port_of_a_stranger():
    """A workload that is not behind the service means what the service says."""
    assert target_port(SERVICE, workload("w"), 80) == 8080
    assert target_port(SERVICE, workload("w"), 81) == 0


TUNNEL = ApplicationTunnel(TunnelledProtocol.PROXY, 15088)
ANY_PORT = ApplicationTunnel(TunnelledProtocol.PROXY)


@pytest.mark.parametrize(
    ("tunnel", "waypoint", "port"),
    [(TUNNEL, True, 15008), (ANY_PORT, True, None), (None, True, None), (TUNNEL, False, None)],
)
def test_waypoint_port(tunnel, waypoint, port):
    """A waypoint whose application takes all traffic on one port needs no service port."""
    result = found(
        SERVICE,
        endpoint("w", SERVICE, application_tunnel=tunnel),
        port=15008,
        waypoint=waypoint,
    )
    assert [c.port for c in result.members] == ([port] if port else [])


def test_expected_identities():
    """An endpoint may prove its own identity or one that the service lists."""
    listed = spiffe("listed")
    svc = service("s", subject_alt_names=(listed,))
    [candidate] = found(svc, endpoint("e", svc)).members
    assert candidate.expected == {spiffe("e"), listed}


def test_weights():
    """The pick is weighted by capacity; an endpoint of capacity 0 is never picked."""
    a, idle, b = (endpoint(n, SERVICE, capacity=c) for n, c in (("a", 1), ("idle", 0), ("b", 3)))
    result = found(SERVICE, a, idle, b)
    asked = []

    def pick(number):
        return result.pick(lambda total: asked.append(total) or number).workload.name

    assert [pick(number) for number in range(4)] == ["a", "b", "b", "b"]
    assert asked == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("addresses", "asked", "expected"),
    [
        (["10.0.1.1", "fd00::1"], "10.96.0.1", "10.0.1.1"),
        (["10.0.1.1", "fd00::1"], "fd96::1", "fd00::1"),
        (["10.0.1.1"], "fd96::1", "10.0.1.1"),
        (["fd00::1"], "10.96.0.1", "fd00::1"),
        (["10.0.1.1", "10.0.1.2"], "10.0.1.2", "10.0.1.2"),
    ],
)
def test_address(addresses, asked, expected):
    """An endpoint is reached at the very address asked for, or one of its family, or any."""
    [candidate] = found(SERVICE, endpoint("e", SERVICE, *addresses)).members
    assert candidate.address_for(asked) == expected


def test_families_of_the_service():
    """An address of a family that the service does not use is never chosen."""
    [candidate] = found(V6_ONLY, endpoint("e", V6_ONLY, "10.0.1.1", "fd00::1")).members
    assert candidate.address_for("10.96.0.1") == "fd00::1"


def test_kept_results_are_bounded():
    """What a snapshot keeps grows with what is configured, not with what clients ask for."""
    snapshot = Snapshot([endpoint("e", SERVICE)], [SERVICE])
    for port in range(80, 1080):
        candidates(snapshot, SERVICE, port, CLIENT)
    assert len(snapshot.memo) == 1


def test_kept_results_are_per_place():
    """Two clients in different places do not get each other's candidates."""
    svc = service("s", balancing=FAILOVER, routing_preferences=(RoutingScope.NODE,))
    snapshot = Snapshot([endpoint("e1", svc, node="n1"), endpoint("e2", svc, node="n2")], [svc])
    for client in (CLIENT, dataclasses.replace(CLIENT, node="n2"), CLIENT):
        [candidate] = candidates(snapshot, svc, 80, client).members
        assert candidate.workload.node == client.node


def test_only():
    """A workload that is addressed itself is its own single candidate."""
    [candidate] = only(workload("w", "10.0.1.1"), 8080, CLIENT).members
    assert (candidate.port, candidate.expected) == (8080, {spiffe("w")})
    far = workload("w", "10.0.1.1", network="far")
    assert "is not on the client's network" in only(far, 80, CLIENT).problem
    assert only(workload("w"), 80, CLIENT).problem == "workload default/w has no address"
