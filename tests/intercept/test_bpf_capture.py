"""What `bpf` and `tc` capture, what they leave alone, what each end sees; two pods always."""

from __future__ import annotations

import ctypes
import errno
import socket
from collections.abc import Iterator

import pytest

from pyambient.intercept.interface import Stage
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import INBOUND_PORT, LOOPBACK_MARK, OUTBOUND_PORT
from tests.bed import (
    IPPROTO_MPTCP,
    Bed,
    BedPod,
    Child,
    ClientOptions,
    Exchange,
    apps,
    has_mptcp,
)
from tests.bed.nullproxy import Interception

from .bpf_mesh import PORT, BpfMesh, at, serve

pytestmark = pytest.mark.usefixtures("kernel", "bpf_backend")


@pytest.fixture
def mesh(bed: Bed) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is outside the mesh."""
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        bed.pod("c")
        yield made


def _pod(mesh: BpfMesh, name: str) -> BedPod:
    return mesh.bed.pods[name]


def _outbound(pod: str, exchange: Exchange, destination: SocketAddress) -> Interception:
    assert exchange.local is not None
    return Interception(pod, OUTBOUND_PORT, exchange.local, destination)


def _accepted(echo: Child) -> list[apps.Accepted]:
    return list(echo.ask("accepted"))


@pytest.mark.parametrize("device", [None, "eth0"])
def test_outbound_reaches_the_proxy(mesh: BpfMesh, family: str, device: str | None) -> None:
    """An unprivileged app is captured, bound to a device or not, and sees the true addresses."""
    destination = at(_pod(mesh, "c"), family)
    serve(_pod(mesh, "c"))

    exchange = _pod(mesh, "a").run(apps.request, destination, b"out", ClientOptions(device=device))

    assert (exchange.data, exchange.errno, exchange.peer) == (b"out", None, destination)
    assert exchange.local.ip == _pod(mesh, "a").address(family)
    assert mesh.intercepted() == [_outbound("a", exchange, destination)]


def test_outbound_of_an_ipv4_mapped_socket(mesh: BpfMesh) -> None:
    """An IPv6 socket that connects to ::ffff:a.b.c.d is captured as IPv4."""
    destination = at(_pod(mesh, "c"), "v4")
    serve(_pod(mesh, "c"))

    exchange = _pod(mesh, "a").run(
        apps.request, destination, b"mapped", ClientOptions(v4_mapped=True)
    )

    assert (exchange.data, exchange.errno) == (b"mapped", None)
    assert mesh.intercepted() == [_outbound("a", exchange, destination)]


def test_outbound_with_a_bound_source(mesh: BpfMesh, family: str) -> None:
    """An app that chose its source address is captured and keeps it."""
    destination, source = at(_pod(mesh, "c"), family), _pod(mesh, "a").address(family)
    serve(_pod(mesh, "c"))

    exchange = _pod(mesh, "a").run(
        apps.request, destination, b"bound", ClientOptions(source=source)
    )

    assert (exchange.data, exchange.local.ip) == (b"bound", source)
    assert mesh.intercepted() == [_outbound("a", exchange, destination)]


def _mptcp_request(destination: SocketAddress) -> bytes:
    with socket.socket(destination.family, socket.SOCK_STREAM, IPPROTO_MPTCP) as client:
        client.settimeout(10)
        client.connect(destination.sockaddr())
        client.sendall(b"multi")
        client.shutdown(socket.SHUT_WR)
        return client.recv(100)


@pytest.mark.skipif(not has_mptcp(), reason="this kernel is built without CONFIG_MPTCP")
def test_outbound_of_multipath_tcp(mesh: BpfMesh, family: str) -> None:
    """A Multipath TCP socket (protocol 262) is captured like any other."""
    destination = at(_pod(mesh, "c"), family)
    serve(_pod(mesh, "c"))

    assert _pod(mesh, "a").run(_mptcp_request, destination) == b"multi"

    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, destination)]


def _fast_open(destination: SocketAddress) -> bytes:
    with socket.socket(destination.family, socket.SOCK_STREAM) as client:
        client.sendto(b"fast", socket.MSG_FASTOPEN, destination.sockaddr())
        client.shutdown(socket.SHUT_WR)
        return client.recv(100)


def test_outbound_of_fast_open(mesh: BpfMesh, family: str) -> None:
    """TCP Fast Open connects within sendto() and is captured as well."""
    destination = at(_pod(mesh, "c"), family)
    serve(_pod(mesh, "c"))

    assert _pod(mesh, "a").run(_fast_open, destination) == b"fast"

    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, destination)]


def test_inbound_reaches_the_proxy_and_keeps_the_source(mesh: BpfMesh, family: str) -> None:
    """A connection from outside goes to 15006; the app sees the client's own address."""
    destination, echo = at(_pod(mesh, "b"), family), serve(_pod(mesh, "b"))

    exchange = _pod(mesh, "c").run(apps.request, destination, b"in")

    assert (exchange.data, exchange.errno, exchange.peer) == (b"in", None, destination)
    assert mesh.intercepted() == [Interception("b", INBOUND_PORT, exchange.local, destination)]
    (accepted,) = _accepted(echo)
    assert (accepted.peer.ip, accepted.local) == (exchange.local.ip, destination)


def test_both_ends_enrolled(mesh: BpfMesh, family: str) -> None:
    """Between two enrolled pods each end is captured in its own pod, and the source is kept."""
    destination, echo = at(_pod(mesh, "b"), family), serve(_pod(mesh, "b"))

    exchange = _pod(mesh, "a").run(apps.request, destination, b"both")

    assert (exchange.data, exchange.errno) == (b"both", None)
    seen = {(s.pod, s.port): s for s in mesh.intercepted()}
    assert seen["a", OUTBOUND_PORT] == _outbound("a", exchange, destination)
    assert seen["b", INBOUND_PORT].original == destination
    assert seen["b", INBOUND_PORT].peer.ip == exchange.local.ip
    assert [a.peer.ip for a in _accepted(echo)] == [exchange.local.ip]


def test_the_pod_to_itself_is_left_alone(mesh: BpfMesh, family: str) -> None:
    """Connections to the pod's own address and to loopback never reach the proxy."""
    pod = _pod(mesh, "a")
    serve(pod)
    loopback = SocketAddress("127.0.0.1" if family == "v4" else "::1", PORT)

    for destination in (at(pod, family), loopback):
        exchange = pod.run(apps.request, destination, b"home")
        assert (exchange.data, exchange.errno) == (b"home", None)

    assert mesh.intercepted() == []


def test_loopback_source_to_the_own_address(mesh: BpfMesh) -> None:
    """A socket bound to 127.0.0.1 that connects to the pod's own address stays inside the pod."""
    pod = _pod(mesh, "a")
    serve(pod)

    exchange = pod.run(apps.request, at(pod, "v4"), b"home", ClientOptions(source="127.0.0.1"))

    assert (exchange.data, exchange.errno) == (b"home", None)
    assert mesh.intercepted() == []


def _connect_twice(first: SocketAddress, second: SocketAddress) -> list[tuple[bytes, int]]:
    """For each connection of one socket what was answered, and the socket's mark then."""
    with socket.socket(second.family, socket.SOCK_STREAM) as client:
        one = _exchange(client, first)
        # An address of family AF_UNSPEC dissolves the association (connect(2)).
        assert ctypes.CDLL(None).connect(client.fileno(), bytes(16), 16) == 0
        return [one, _exchange(client, second)]


def _exchange(client: socket.socket, destination: SocketAddress) -> tuple[bytes, int]:
    client.connect(destination.sockaddr())
    client.sendall(b"again")
    return client.recv(100), client.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)


def test_a_socket_that_connects_twice(mesh: BpfMesh, family: str) -> None:
    """A socket that was captured once reaches the pod itself next, without a mark of ours."""
    pod, outside = _pod(mesh, "a"), _pod(mesh, "c")
    serve(pod)
    serve(outside)

    answers = pod.run(_connect_twice, at(outside, family), at(pod, family))

    mark = LOOPBACK_MARK if mesh.backend == "bpf" else 0
    assert answers == [(b"again", mark), (b"again", 0)]
    assert [s.original for s in mesh.intercepted()] == [at(outside, family)]


def test_a_closed_port_is_refused_at_once(mesh: BpfMesh, family: str) -> None:
    """The RST of a closed port comes back to the proxy over lo, and to the client as a reset."""
    destination = at(_pod(mesh, "b"), family)

    exchange = _pod(mesh, "c").run(apps.request, destination)

    assert exchange.errno in (errno.ECONNRESET, errno.EPIPE)
    assert [(s.port, s.failure) for s in mesh.intercepted()] == [(INBOUND_PORT, errno.ECONNREFUSED)]


def test_other_protocols_pass(mesh: BpfMesh, family: str) -> None:
    """UDP in both directions goes past the proxy."""
    for client, server in (("a", "c"), ("c", "a")):
        udp = _pod(mesh, server).spawn(apps.udp_echo, PORT)
        assert udp.receive() == "listening"
        exchange = _pod(mesh, client).run(apps.udp_request, at(_pod(mesh, server), family))
        assert (exchange.data, exchange.errno) == (b"hello", None)


def test_an_outsider_is_left_alone(mesh: BpfMesh, family: str) -> None:
    """A pod that is not enrolled talks past the proxy, although its cgroup has the hooks."""
    serve(_pod(mesh, "c"))

    exchange = mesh.bed.node.run(apps.request, at(_pod(mesh, "c"), family), b"out")

    assert (exchange.data, exchange.errno) == (b"out", None)
    assert mesh.intercepted() == []


def test_two_pods_with_the_same_address(bed: Bed, family: str) -> None:
    """Pods of separate networks may share an address; each is captured on its own."""
    one, two = bed.twin_networks()
    with BpfMesh(bed, one.pod, two.pod) as mesh:
        for twin in (one, two):
            serve(twin.peer)
            out = twin.pod.run(apps.request, at(twin.peer, family), twin.pod.name.encode())
            assert (out.data, out.errno) == (twin.pod.name.encode(), None)
            serve(twin.pod)
            back = twin.peer.run(apps.request, at(twin.pod, family), b"in")
            assert (back.data, back.errno) == (b"in", None)
            expected = [(twin.pod.name, OUTBOUND_PORT), (twin.pod.name, INBOUND_PORT)]
            assert [(s.pod, s.port) for s in mesh.intercepted()][-2:] == expected


def test_a_peer_with_the_address_of_another_pod(bed: Bed, family: str) -> None:
    """An address that belongs to one enrolled pod is foreign to another one, out and in."""
    one, two = bed.twin_networks()
    with BpfMesh(bed, one.pod, two.peer) as mesh:
        serve(one.peer)
        serve(one.pod)

        out = one.pod.run(apps.request, at(two.peer, family), b"out")
        back = one.peer.run(apps.request, at(one.pod, family), b"in")

        assert (out.data, back.data) == (b"out", b"in")
        assert [(s.pod, s.port) for s in mesh.intercepted()] == [
            (one.pod.name, OUTBOUND_PORT),
            (one.pod.name, INBOUND_PORT),
        ]


def test_pods_of_one_family(bed: Bed) -> None:
    """A pod without IPv6 and one without an IPv4 address are captured in what they have."""
    pods = {"v4": bed.pod("a", ipv6=False), "v6": bed.pod("b", ipv4=False)}
    outside = bed.pod("c")
    serve(outside)
    with BpfMesh(bed, *pods.values()) as mesh:
        for family, pod in pods.items():
            serve(pod)
            assert pod.run(apps.request, at(outside, family), b"out").data == b"out"
            assert outside.run(apps.request, at(pod, family), b"in").data == b"in"

        seen = [(s.pod, s.port) for s in mesh.intercepted()]
    assert seen == [(name, port) for name in "ab" for port in (OUTBOUND_PORT, INBOUND_PORT)]


def test_connections_from_before_survive(bed: Bed, family: str) -> None:
    """Connections opened before the enrolment go on through it, in both directions."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    serve(a)
    serve(c)
    out = a.spawn(apps.hold, at(c, family), 3)
    inward = c.spawn(apps.hold, at(a, family), 3)
    assert (out.receive(), inward.receive()) == ({}, {})

    with BpfMesh(bed, a, b) as mesh:
        assert (out.ask("ping"), inward.ask("ping")) == ({}, {})
        assert mesh.intercepted() == []
    assert (out.ask("ping"), inward.ask("ping")) == ({}, {})


def test_the_proxy_delivers_without_the_gate(mesh: BpfMesh, family: str) -> None:
    """What reached the proxy before the gate was closed still reaches the app."""
    a, c = _pod(mesh, "a"), _pod(mesh, "c")
    echo = serve(a)
    mesh.release_stages(a, (Stage.GATE,))

    exchange = c.run(apps.request, at(a, family))

    assert (exchange.data, exchange.errno) == (b"hello", None)
    assert [(s.port, s.failure) for s in mesh.intercepted()] == [(INBOUND_PORT, 0)]
    assert [accepted.peer.ip for accepted in _accepted(echo)] == [exchange.local.ip]


def test_captured_connections_survive_the_end_of_capture(mesh: BpfMesh, family: str) -> None:
    """With gate and steering undone, captured connections go on and new ones are direct."""
    a, c = _pod(mesh, "a"), _pod(mesh, "c")
    serve(a)
    serve(c)
    out = a.spawn(apps.hold, at(c, family), 3)
    inward = c.spawn(apps.hold, at(a, family), 3)
    assert (out.receive(), inward.receive()) == ({}, {})
    assert len(mesh.intercepted()) == 6

    mesh.release_stages(a, (Stage.STEER, Stage.GATE))

    assert (out.ask("ping"), inward.ask("ping")) == ({}, {})
    assert a.run(apps.request, at(c, family)).data == b"hello"
    assert c.run(apps.request, at(a, family)).data == b"hello"
    assert len(mesh.intercepted()) == 6
