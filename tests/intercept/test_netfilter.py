"""What the netfilter backends capture and leave alone; two enrolled pods in every test."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from pyambient.intercept.interface import Interceptor, Stage
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import (
    HBONE_PORT,
    INBOUND_PORT,
    OUTBOUND_PORT,
    PROBE_ADDRESS_V4,
    PROBE_ADDRESS_V6,
)
from tests.bed import (
    Accepted,
    Bed,
    BedPod,
    Child,
    ClientOptions,
    Interception,
    Network,
    apps,
)

from .netfilter_mesh import FOUNDATION, INTERCEPTORS, STEERING, NetfilterMesh, target

PORT = 8080
OTHER_PORT = 9090


@pytest.fixture
def mesh(bed: Bed, interceptor: Interceptor) -> Iterator[NetfilterMesh]:
    """Pods a and b enrolled; pod c of the bed is outside the mesh."""
    with NetfilterMesh(bed, bed.pod("a"), bed.pod("b"), interceptor=interceptor) as made:
        bed.pod("c")
        yield made


legacy_too = pytest.mark.parametrize("interceptor", list(INTERCEPTORS), indirect=True)


def _serve(pod: BedPod, port: int = PORT) -> Child:
    server = pod.spawn(apps.echo_server, port)
    assert server.receive() == "listening"
    return server


def _hold(pod: BedPod, destination: SocketAddress, count: int = 1) -> Child:
    held = pod.spawn(apps.hold, destination, count)
    assert held.receive() == {}
    return held


def _at(pod: BedPod, family: str, port: int = PORT) -> SocketAddress:
    return SocketAddress(pod.address(family), port)


@legacy_too
def test_outbound_reaches_the_proxy(mesh: NetfilterMesh, family: str) -> None:
    """An unprivileged app's connection to 15001, with the original destination at hand."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    _serve(c)

    seen = a.run(apps.request, _at(c, family), b"ping")

    assert (seen.data, seen.errno, seen.peer) == (b"ping", None, _at(c, family))
    assert mesh.intercepted() == [Interception("a", OUTBOUND_PORT, seen.local, _at(c, family))]


@legacy_too
def test_inbound_reaches_the_proxy_and_keeps_the_source(mesh: NetfilterMesh, family: str) -> None:
    """A connection from outside goes to 15006, and the app still sees who called."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    echo = _serve(a)

    seen = c.run(apps.request, _at(a, family), b"ping")

    assert (seen.data, seen.errno) == (b"ping", None)
    assert mesh.intercepted() == [Interception("a", INBOUND_PORT, seen.local, _at(a, family))]
    (accepted,) = echo.ask("accepted")
    assert (accepted.peer.ip, accepted.local) == (c.address(family), _at(a, family))


def test_between_two_enrolled_pods(mesh: NetfilterMesh, family: str) -> None:
    """Both proxies are passed once, and the server sees the client's own address."""
    a, b = mesh.bed.pods["a"], mesh.bed.pods["b"]
    echo = _serve(b)

    assert a.run(apps.request, _at(b, family), b"ping").data == b"ping"

    passed = [(one.pod, one.port, one.original) for one in mesh.intercepted()]
    outbound = ("a", OUTBOUND_PORT, _at(b, family))
    assert sorted(passed) == sorted([outbound, ("b", INBOUND_PORT, _at(b, family))])
    (accepted,) = echo.ask("accepted")
    assert accepted.peer.ip == a.address(family)


def test_hbone_is_not_redirected(mesh: NetfilterMesh, family: str) -> None:
    """A connection from outside to 15008 reaches the listener there as it is."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    c.run(apps.request, _at(a, family, HBONE_PORT))
    assert [(one.port, one.original) for one in mesh.intercepted()] == [
        (HBONE_PORT, _at(a, family, HBONE_PORT))
    ]


def test_a_v4_mapped_socket_is_captured(mesh: NetfilterMesh) -> None:
    """An IPv6 socket connecting to ::ffff:10.77.0.4 counts as IPv4."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    _serve(c)
    options = ClientOptions(v4_mapped=True)
    assert a.run(apps.request, _at(c, "v4"), b"ping", options).data == b"ping"
    assert [one.original for one in mesh.intercepted()] == [_at(c, "v4")]


@legacy_too
def test_the_pod_itself_is_left_alone(mesh: NetfilterMesh, family: str) -> None:
    """Connections to the own address and to localhost never meet the proxy."""
    a = mesh.bed.pods["a"]
    echo = _serve(a)
    localhost = SocketAddress("127.0.0.1" if family == "v4" else "::1", PORT)

    hairpin = a.run(apps.request, _at(a, family))
    local = a.run(apps.request, localhost)

    assert (hairpin.data, local.data) == (b"hello", b"hello")
    assert mesh.intercepted() == []
    assert echo.ask("accepted") == [
        Accepted(hairpin.local, _at(a, family)),
        Accepted(local.local, localhost),
    ]


def test_a_health_probe_is_left_alone(mesh: NetfilterMesh, family: str) -> None:
    """What comes from the address that nodes probe from reaches the app directly."""
    a = mesh.bed.pods["a"]
    source = PROBE_ADDRESS_V4 if family == "v4" else PROBE_ADDRESS_V6
    mesh.bed.node.ip(f"addr add {source} dev br77 {'nodad' if family == 'v6' else ''}")
    echo = _serve(a)

    seen = mesh.bed.node.run(apps.request, _at(a, family), b"alive?", ClientOptions(source=source))

    assert seen.data == b"alive?"
    assert mesh.intercepted() == []
    assert [one.peer.ip for one in echo.ask("accepted")] == [source]


def test_the_nodes_probes_come_from_that_address(mesh: NetfilterMesh, family: str) -> None:
    """What a socket of the node opens reaches the app, and seems to come from there."""
    a, b, node = mesh.bed.pods["a"], mesh.bed.pods["b"], mesh.bed.node
    source = PROBE_ADDRESS_V4 if family == "v4" else PROBE_ADDRESS_V6
    for pod in (a, b):
        echo = _serve(pod)
        assert node.run(apps.request, _at(pod, family), b"alive?").data == b"alive?"
        assert [one.peer.ip for one in echo.ask("accepted")] == [source]
    assert mesh.intercepted() == []


def test_the_nodes_address_proves_nothing(
    mesh: NetfilterMesh, masqueraded: BedPod, family: str
) -> None:
    """What the node masquerades comes from its address and goes to the proxy."""
    a = mesh.bed.pods["a"]
    _serve(a)
    masqueraded.run(apps.request, _at(a, family), b"alive?")
    (seen,) = mesh.intercepted()
    assert (seen.port, seen.peer.ip) == (INBOUND_PORT, mesh.bed.node.address(family))


def test_the_node_keeps_nothing_of_a_pod_that_left(mesh: NetfilterMesh) -> None:
    """Its rules go with it, those of others stay; with the last one the tables go."""
    a, b = mesh.bed.pods["a"], mesh.bed.pods["b"]
    mesh.close(a, tuple(Stage))
    assert [what for step in mesh.recorded["b"] if (what := step.missing(target(b)))] == []
    mesh.close(b, tuple(Stage))
    assert mesh.bed.node.command("nft", "list", "ruleset") == ""


def test_a_closed_port_is_refused_at_once(mesh: NetfilterMesh, family: str) -> None:
    """The reset of a closed port finds its way back to the proxy, and from there to the client."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]

    seen = c.run(apps.request, _at(a, family))

    assert seen.errno in (errno.ECONNRESET, errno.EPIPE)
    assert [(one.port, one.failure) for one in mesh.intercepted()] == [
        (INBOUND_PORT, errno.ECONNREFUSED)
    ]


def test_udp_passes(mesh: NetfilterMesh, family: str) -> None:
    """UDP in both directions goes past the proxy."""
    for client, server in (("a", "c"), ("c", "a")):
        echo = mesh.bed.pods[server].spawn(apps.udp_echo, PORT)
        assert echo.receive() == "listening"
        seen = mesh.bed.pods[client].run(apps.udp_request, _at(mesh.bed.pods[server], family))
        assert (seen.data, seen.errno) == (b"hello", None)


def test_connections_from_before_survive(bed: Bed, interceptor: Interceptor, family: str) -> None:
    """Enrolment and un-enrolment leave alone what was connected before, in both directions."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    for pod in (a, c):
        _serve(pod)
    held = [_hold(a, _at(c, family), 3), _hold(c, _at(a, family), 3)]

    with NetfilterMesh(bed, a, b, interceptor=interceptor) as mesh:
        assert [one.ask("ping") for one in held] == [{}, {}]
        assert mesh.intercepted() == []
    assert [one.ask("ping") for one in held] == [{}, {}]


@legacy_too
def test_redirected_connections_survive_the_end_of_steering(
    mesh: NetfilterMesh, family: str
) -> None:
    """With gate and steering closed, live connections go on by the proxy and new ones do not."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    for pod in (a, c):
        _serve(pod)
        _serve(pod, OTHER_PORT)
    held = [_hold(a, _at(c, family), 3), _hold(c, _at(a, family), 3)]
    assert len(mesh.intercepted()) == 6

    mesh.close(a, STEERING)

    assert [one.ask("ping") for one in held] == [{}, {}]
    assert a.run(apps.request, _at(c, family, OTHER_PORT)).data == b"hello"
    assert c.run(apps.request, _at(a, family, OTHER_PORT)).data == b"hello"
    assert [one.ask("ping") for one in held] == [{}, {}]
    assert len(mesh.intercepted()) == 6


def test_connections_made_while_draining_survive_the_rest(mesh: NetfilterMesh, family: str) -> None:
    """A connection opened after the steering ended outlives the tables it was opened under."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    for pod in (a, c):
        _serve(pod)
    mesh.close(a, STEERING)
    held = [_hold(a, _at(c, family)), _hold(c, _at(a, family))]

    mesh.close(a, FOUNDATION)

    assert [one.ask("ping") for one in held] == [{}, {}]


def test_without_a_proxy_nothing_leaves(mesh: NetfilterMesh, family: str) -> None:
    """An enrolled pod whose proxy has died is refused, never sent past the mesh in plaintext."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    echo = _serve(c)
    mesh.proxy.child.kill()

    seen = a.run(apps.request, _at(c, family))

    assert (seen.stage, seen.errno) == ("connect", errno.ECONNREFUSED)
    assert echo.ask("accepted") == []


def test_many_connections_are_held(bed: Bed, interceptor: Interceptor, family: str) -> None:
    """A thousand connections through two proxies at once, each with its own destination data."""
    a, b = bed.pod("a"), bed.pod("b")
    _serve(b)
    with NetfilterMesh(bed, a, b, interceptor=interceptor) as mesh:
        held = _hold(a, _at(b, family), 1000)
        assert held.ask("ping") == {}
        assert len(mesh.intercepted()) == 2000


def test_a_device_that_comes_later_is_captured(
    bed: Bed, interceptor: Interceptor, family: str
) -> None:
    """The rules name no device: what goes by a second one is redirected, both ways, at once."""
    side = bed.add_network(Network("br78", "10.78.0", "fd78::", node_is_router=False))
    a, b, neighbour = bed.pod("a"), bed.pod("b"), bed.pod("n", network=side)
    with NetfilterMesh(bed, a, b, interceptor=interceptor) as mesh:
        inside = dict(zip(("v4", "v6"), bed.add_device(a, "eth1", side), strict=True))
        _serve(neighbour)
        _serve(a)
        assert a.run(apps.request, _at(neighbour, family)).data == b"hello"
        destination = SocketAddress(inside[family], PORT)
        assert neighbour.run(apps.request, destination).data == b"hello"
        passed = [(seen.port, seen.original) for seen in mesh.intercepted()]
        assert passed == [(OUTBOUND_PORT, _at(neighbour, family)), (INBOUND_PORT, destination)]


def test_a_device_bound_app_gets_nothing_out(mesh: NetfilterMesh, family: str) -> None:
    """Netfilter cannot redirect such a socket to lo; it hangs, but does not bypass the mesh."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    echo = _serve(c)
    options = ClientOptions(device="eth0", timeout=1.0)
    assert a.run(apps.request, _at(c, family), options=options).failed
    assert echo.ask("accepted") == []


def test_two_pods_with_one_address(bed: Bed, interceptor: Interceptor, family: str) -> None:
    """Pods of separate networks may share an address; each is captured on its own."""
    one, two = bed.twin_networks()
    with NetfilterMesh(bed, one.pod, two.pod, interceptor=interceptor) as mesh:
        for twin in (one, two):
            _serve(twin.peer)
            _serve(twin.pod)
            assert twin.pod.run(apps.request, _at(twin.peer, family)).data == b"hello"
            assert twin.peer.run(apps.request, _at(twin.pod, family)).data == b"hello"
            passed = [(seen.pod, seen.port) for seen in mesh.intercepted()][-2:]
            assert passed == [(twin.pod.name, OUTBOUND_PORT), (twin.pod.name, INBOUND_PORT)]
