"""Where captured outbound connections go: one row per rule."""

from __future__ import annotations

import random

import pytest

from pyambient.mesh.route import Plain, Refuse, Tunnel, decide_outbound
from pyambient.mesh.snapshot import Snapshot
from pyambient.model.address import SocketAddress
from pyambient.model.workload import (
    ApplicationTunnel,
    HealthStatus,
    LoadBalancerMode,
    NetworkAddress,
    TunnelledProtocol,
    TunnelProtocol,
    WeightedWaypoint,
)
from tests.mesh.build import behind, first, gateway, service, spiffe, workload

VIP = "10.96.0.1"
UNREACHED = "on the client's network, and tunnels through network gateways are not supported"
WAYPOINT_HOST = "default/waypoint.default.svc.cluster.local"

SERVICE = service("web", VIP, "fd96::1", subject_alt_names=(spiffe("shared"),))
PASSTHROUGH = service("pass", "10.96.0.2", balancing=LoadBalancerMode.PASSTHROUGH)
EMPTY = service("empty", "10.96.0.3")
GUARDED = service("guarded", "10.96.0.4", waypoint=gateway(WAYPOINT_HOST))
LOST = service("lost", "10.96.0.5", waypoint=gateway("default/nowhere"))
REMOTE = service("remote", "10.96.0.6")
TEXT = service("text", "10.96.0.7")
GUARDED_PASS = service(
    "gp", "10.96.0.8", waypoint=gateway("/10.0.0.30"), balancing=LoadBalancerMode.PASSTHROUGH
)
FAR_WAYPOINT = service("fw", "10.96.0.9", waypoint=gateway("default/far.example"))
SHADOWED = service("shadowed", "10.0.0.20")
WAYPOINT = service(
    "waypoint", "10.96.0.99", ports={15008: 15008}, subject_alt_names=(spiffe("gateways"),)
)

CLIENT = workload("client", "10.0.0.1", "fd00::1")
SERVER = workload("server", "10.0.0.20", "fd00::20", services=behind(SERVICE, GUARDED, PASSTHROUGH))
PLAIN = workload(
    "plain", "10.0.0.21", protocol=TunnelProtocol.NONE, services=behind(TEXT, ports={80: 9090})
)
SHY = workload("shy", "10.0.0.22", waypoint=gateway(WAYPOINT_HOST))
SHY_BY_IP = workload("shy-ip", "10.0.0.23", waypoint=gateway("/fd00::30"))
SHY_LOST = workload("shy-lost", "10.0.0.24", waypoint=gateway("/10.9.9.9", 15009))
FAR = workload("far", "10.1.0.1", network="far", services=behind(REMOTE))
FAR_GATE = workload("far-gate", "10.1.0.2", network="far", hostname="far.example")
SICK = workload("sick", "10.0.0.25", status=HealthStatus.UNHEALTHY, services=behind(EMPTY))
GATE = workload(
    "gate", "10.0.0.30", "fd00::30", protocol=TunnelProtocol.NONE, services=behind(WAYPOINT)
)

MESH = Snapshot(
    [CLIENT, SERVER, PLAIN, SHY, SHY_BY_IP, SHY_LOST, FAR, FAR_GATE, SICK, GATE],
    [
        SERVICE,
        PASSTHROUGH,
        EMPTY,
        GUARDED,
        LOST,
        REMOTE,
        TEXT,
        GUARDED_PASS,
        FAR_WAYPOINT,
        SHADOWED,
        WAYPOINT,
    ],
)


def to(text: str) -> SocketAddress:
    host, _, port = text.rpartition(":")
    return SocketAddress(host.strip("[]"), int(port))


def route(destination: str, source=CLIENT, choose=first):
    return decide_outbound(MESH, source, to(destination), choose)


TUNNELS = [
    # to an endpoint of a service, at its own address and target port
    (f"{VIP}:80", "10.0.0.20:15008", "10.0.0.20:8080", ["server", "shared"], SERVER, SERVICE),
    ("[fd96::1]:80", "[fd00::20]:15008", "[fd00::20]:8080", ["server", "shared"], SERVER, SERVICE),
    # to a workload that is addressed itself, even if a service has its address too
    ("10.0.0.20:8080", "10.0.0.20:15008", "10.0.0.20:8080", ["server"], SERVER, None),
    ("[fd00::20]:22", "[fd00::20]:15008", "[fd00::20]:22", ["server"], SERVER, None),
    # to the waypoint of a service, for what the client asked for
    ("10.96.0.4:80", "10.0.0.30:15008", "10.96.0.4:80", ["gate", "gateways"], GATE, GUARDED),
    ("10.96.0.4:81", "10.0.0.30:15008", "10.96.0.4:81", ["gate", "gateways"], GATE, GUARDED),
    ("10.96.0.8:80", "10.0.0.30:15008", "10.96.0.8:80", ["gate"], GATE, GUARDED_PASS),
    # to the waypoint of a workload, by the address that names it
    ("10.0.0.22:80", "10.0.0.30:15008", "10.0.0.22:80", ["gate", "gateways"], GATE, None),
    ("10.0.0.23:80", "[fd00::30]:15008", "10.0.0.23:80", ["gate"], GATE, None),
]


@pytest.mark.parametrize(
    ("destination", "next_hop", "authority", "expected", "workload", "service"), TUNNELS
)
def test_tunnels(destination, next_hop, authority, expected, workload, service):
    """What speaks HBONE, or stands behind a waypoint, is reached through a tunnel."""
    decided = route(destination)
    assert isinstance(decided, Tunnel)
    assert (decided.next_hop, decided.authority) == (to(next_hop), authority)
    assert decided.expected == {spiffe(account) for account in expected}
    assert (decided.workload, decided.service) == (workload, service)


@pytest.mark.parametrize(
    ("destination", "address", "workload", "service", "why"),
    [
        ("1.2.3.4:80", "1.2.3.4:80", None, None, "no workload and no service has this address"),
        ("[2001:db8::1]:80", "[2001:db8::1]:80", None, None, "no workload and no service"),
        ("127.0.0.1:80", "127.0.0.1:80", None, None, "no workload and no service"),
        ("10.1.0.1:80", "10.1.0.1:80", None, None, "no workload and no service"),
        ("10.96.0.2:80", "10.96.0.2:80", None, None, "passes connections through"),
        ("10.96.0.2:81", "10.96.0.2:81", None, None, "passes connections through"),
        ("10.0.0.21:22", "10.0.0.21:22", PLAIN, None, "does not speak HBONE"),
        ("10.96.0.7:80", "10.0.0.21:9090", PLAIN, TEXT, "does not speak HBONE"),
    ],
)
def test_plain(destination, address, workload, service, why):
    """What is outside the mesh is reached as it is, what speaks no HBONE by plain TCP."""
    decided = route(destination)
    assert isinstance(decided, Plain)
    assert decided.address == to(address)
    assert (decided.workload, decided.service) == (workload, service)
    assert why in decided.why


@pytest.mark.parametrize(
    ("destination", "reason"),
    [
        ("127.0.0.1:15001", "attempted recursive call to ourselves"),
        ("127.8.8.8:15006", "attempted recursive call to ourselves"),
        ("[::1]:15008", "attempted recursive call to ourselves"),
        ("10.0.0.1:15008", "attempted recursive call to ourselves"),
        ("[fd00::1]:15001", "attempted recursive call to ourselves"),
        (
            f"{VIP}:81",
            f"no healthy upstream: {VIP}:81 (service {SERVICE} has no port 81)",
        ),
        (
            "10.96.0.3:80",
            f"no healthy upstream: 10.96.0.3:80 (no endpoint of service {EMPTY} is healthy)",
        ),
        (
            "10.96.0.6:80",
            f"no healthy upstream: 10.96.0.6:80 (no endpoint of service {REMOTE} is {UNREACHED})",
        ),
        (
            "10.96.0.5:80",
            "unknown waypoint: default/nowhere (no service and no workload is called so)",
        ),
        (
            "10.0.0.24:80",
            "unknown waypoint: /10.9.9.9 (no service and no workload is called so)",
        ),
        (
            "10.96.0.9:80",
            f"unknown waypoint: default/far.example (workload default/far-gate is not {UNREACHED})",
        ),
    ],
)
def test_refusals(destination, reason):
    """Loops, services without an endpoint and waypoints that are not there are refused."""
    decided = route(destination)
    assert decided == Refuse(reason)
    assert decided.why == reason


@pytest.mark.parametrize("destination", ["10.0.0.20:15008", "8.8.8.8:15001"])
def test_our_ports_elsewhere(destination):
    """Our port numbers are just ports on someone else's address."""
    assert not isinstance(route(destination), Refuse)


@pytest.mark.parametrize(
    ("destination", "authority"),
    [("10.96.0.4:80", "10.0.0.20:8080"), ("10.0.0.22:80", "10.0.0.22:80")],
)
def test_traffic_of_the_waypoint_itself(destination, authority):
    """What a waypoint sends on does not come back to it."""
    decided = route(destination, source=GATE)
    assert isinstance(decided, Tunnel)
    assert decided.authority == authority


def test_source_network():
    """Addresses mean what they mean in the source's own network."""
    source = workload("s", "10.1.0.7", network="far")
    assert isinstance(route("10.1.0.1:80", source=source), Tunnel)
    assert route("10.0.0.20:80", source=source).workload is None


def test_source_namespace():
    """Of two services with one VIP, the one in the client's namespace is meant."""
    near = service("a", VIP, namespace="near", balancing=LoadBalancerMode.PASSTHROUGH)
    mesh = Snapshot([SERVER], [SERVICE, near])
    client = workload("c", "10.0.0.9", namespace="near")
    assert isinstance(decide_outbound(mesh, client, to(f"{VIP}:80")), Plain)
    assert isinstance(decide_outbound(mesh, CLIENT, to(f"{VIP}:80")), Tunnel)


@pytest.mark.parametrize(
    ("drawn", "next_hop"), [(0, "10.0.0.30"), (1, "10.0.0.31"), (3, "10.0.0.31")]
)
def test_weighted_waypoints(drawn, next_hop):
    """A service's connections are shared among its waypoints by weight, never by weight 0."""
    weights = (("/10.0.0.32", 0), ("/10.0.0.30", 1), ("/10.0.0.31", 3))
    shared = service(
        "shared",
        VIP,
        weighted_waypoints=tuple(WeightedWaypoint(gateway(where), w) for where, w in weights),
    )
    gates = [workload(f"g{n}", f"10.0.0.{n}") for n in (30, 31, 32)]
    decided = decide_outbound(
        Snapshot(gates, [shared]),
        CLIENT,
        to(f"{VIP}:80"),
        lambda total: drawn if total == 4 else 0,
    )
    assert decided.next_hop == SocketAddress(next_hop, 15008)


def test_waypoint_that_takes_every_port():
    """A waypoint whose application takes tunnelled traffic need not define its HBONE port."""
    takes_all = ApplicationTunnel(TunnelledProtocol.PROXY, 15088)
    front = service("front", ports={})
    gate = workload("g", "10.0.0.40", services=behind(front), application_tunnel=takes_all)
    guarded = service("s", VIP, waypoint=gateway(front.key))
    decided = decide_outbound(Snapshot([gate], [front, guarded]), CLIENT, to(f"{VIP}:80"))
    assert isinstance(decided, Tunnel)
    assert decided.next_hop == to("10.0.0.40:15008")


def test_weights_of_zero():
    """Weights that are all zero leave the single waypoint."""
    zero = WeightedWaypoint(gateway("/10.0.0.31"), 0)
    shared = service("s", VIP, waypoint=gateway("/10.0.0.30"), weighted_waypoints=(zero,))
    mesh = Snapshot([GATE], [shared])
    assert decide_outbound(mesh, CLIENT, to(f"{VIP}:80"), first).workload is GATE


def test_random_choice():
    """Left to chance, every endpoint gets connections in proportion to its capacity."""
    svc = service("s", VIP)
    mesh = Snapshot(
        [
            workload("a", "10.0.0.40", services=behind(svc)),
            workload("b", "10.0.0.41", services=behind(svc), capacity=3),
        ],
        [svc],
    )
    choose = random.Random(1).randrange
    routes = [decide_outbound(mesh, CLIENT, to(f"{VIP}:80"), choose) for _ in range(4000)]
    share = sum(r.workload.name == "b" for r in routes) / len(routes)
    assert 0.7 < share < 0.8


def test_vip_in_another_network():
    """A VIP of another network is not ours."""
    remote = service("r", vips=(NetworkAddress("far", VIP),))
    decided = decide_outbound(Snapshot(services=[remote]), CLIENT, to(f"{VIP}:80"))
    assert isinstance(decided, Plain)
    assert decided.workload is None
