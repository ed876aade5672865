"""What nobody gets past or takes over: marks prove nothing, no listener means no connection."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Iterator

import pytest

from pyambient.intercept.loader import Constants
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import (
    INBOUND_PORT,
    LOOPBACK_MARK,
    OUTBOUND_PORT,
    PROXY_MARK,
    RESERVED_PORTS,
)
from tests.bed import Bed, BedPod, ClientOptions, apps, marking
from tests.bed.nullproxy import NullProxy

from .bpf_mesh import BpfMesh, at, serve

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture
def mesh(bed: Bed) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is outside the mesh."""
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        bed.pod("c")
        yield made


def _refused(kernel: Constants) -> int:
    """What connect() fails with where nobody would answer: a hook says EPERM before 5.18."""
    return errno.ECONNREFUSED if kernel.has_set_retval else errno.EPERM


@pytest.mark.parametrize("mark", [PROXY_MARK, LOOPBACK_MARK, 0x10000 | PROXY_MARK])
def test_a_forged_mark_changes_nothing(mesh: BpfMesh, family: str, mark: int) -> None:
    """An app that may set marks and sets the proxy's mark, or ours, is captured all the same."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    serve(c)
    options = ClientOptions(mark=mark)

    exchange = a.run(apps.request, at(c, family), b"x", options, capabilities=marking(a))

    assert (exchange.data, exchange.errno) == (b"x", None)
    assert [(s.pod, s.port, s.original) for s in mesh.intercepted()] == [
        ("a", OUTBOUND_PORT, at(c, family))
    ]


def _ask_without_gateway(destination: SocketAddress, device: bytes) -> bytes:
    with socket.socket(destination.family, socket.SOCK_STREAM) as client:
        client.settimeout(5)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        client.connect(destination.sockaddr())
        client.sendall(b"near")
        return client.recv(100)


@pytest.mark.parametrize("device", [b"", b"eth0"])
def test_a_socket_that_wants_no_gateway_is_captured(
    mesh: BpfMesh, family: str, device: bytes
) -> None:
    """SO_DONTROUTE, which restricts the route lookup to on-link ones, is no way out."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    serve(c)

    assert a.run(_ask_without_gateway, at(c, family), device) == b"near"

    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, at(c, family))]


def _bind_all(mark: int | None) -> list[int]:
    """The errno of each bind: both families, TCP and UDP, all our ports, shared or not."""
    families, kinds = (socket.AF_INET, socket.AF_INET6), (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    errors = []
    for family, kind, port, shared in itertools.product(families, kinds, RESERVED_PORTS, (0, 1)):
        with socket.socket(family, kind) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            if mark is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            errors.append(_bind(made, port))
    return errors


def _bind(made: socket.socket, port: int) -> int:
    try:
        made.bind(("", port))
    except OSError as error:
        return error.errno
    return 0


@pytest.mark.parametrize(
    ("uid", "mark"),
    [(65534, None), (65534, PROXY_MARK), (0, PROXY_MARK)],
    ids=["nobody", "nobody-who-marks", "root"],
)
def test_nobody_else_binds_the_proxys_ports(mesh: BpfMesh, uid: int, mark: int | None) -> None:
    """Bind to 15001, 15006, 15008 or 15053 is EPERM in an enrolled pod, for root as well."""
    a = mesh.bed.pods["a"]
    capabilities = marking(a) if mark else []

    errors = a.run(_bind_all, mark, uid=uid, gid=uid, capabilities=capabilities)

    assert errors == [errno.EPERM] * 32


def test_other_pods_and_ports_bind_freely(mesh: BpfMesh) -> None:
    """The ports are taken in enrolled pods only, and no other port is."""
    listening = [mesh.bed.pods["c"].spawn(apps.echo_server, port) for port in RESERVED_PORTS]
    listening.append(mesh.bed.pods["a"].spawn(apps.echo_server, 15002))
    assert [child.receive() for child in listening] == ["listening"] * 5


def test_without_listeners_a_connect_is_refused(
    mesh: BpfMesh, family: str, kernel: Constants
) -> None:
    """Outbound is refused at connect() when the proxy is gone; the pod itself works on."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    echo = serve(c)
    serve(a)
    mesh.proxy.stop_listening()

    exchange = a.run(apps.request, at(c, family))

    assert (exchange.errno, exchange.stage) == (_refused(kernel), "connect")
    assert echo.ask("accepted") == []
    assert a.run(apps.request, at(a, family)).data == b"hello"


def test_without_listeners_nothing_comes_in(mesh: BpfMesh, family: str) -> None:
    """Inbound is refused when the proxy is gone; the app behind it is not reached."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    echo = serve(a)
    mesh.proxy.child.kill()

    exchange = c.run(apps.request, at(a, family), b"")

    assert (exchange.errno, echo.ask("accepted")) == (errno.ECONNREFUSED, [])


def test_a_restarted_proxy_is_found(mesh: BpfMesh, family: str, kernel: Constants) -> None:
    """Listeners of another process in the proxy's cgroup are taken up without anybody's help."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    serve(c)
    serve(a)
    mesh.proxy.child.kill()
    assert a.run(apps.request, at(c, family)).errno == _refused(kernel)

    mesh.listen()

    assert a.run(apps.request, at(c, family)).data == b"hello"
    assert c.run(apps.request, at(a, family)).data == b"hello"
    assert [s.port for s in mesh.intercepted()] == [OUTBOUND_PORT, INBOUND_PORT]


def test_a_second_proxy_takes_over_and_survives_the_first(mesh: BpfMesh, family: str) -> None:
    """The listeners that came last are used, and the end of the earlier ones changes nothing."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    serve(c)
    first = mesh.proxy
    second = NullProxy.of(mesh.bed, mesh.pods, mesh.backend)

    first.stop_listening()

    assert a.run(apps.request, at(c, family)).data == b"hello"
    assert (len(first.accepted()), len(second.accepted())) == (0, 1)


def test_a_proxy_outside_its_cgroup_is_an_app(mesh: BpfMesh) -> None:
    """What makes the proxy is its cgroup: elsewhere even its mark binds nothing."""
    a = mesh.bed.pods["a"]

    def outside(pod: BedPod) -> list[int]:
        with pod.netns.entered():
            return _bind_all(PROXY_MARK)

    errors = mesh.bed.node.run(outside, a, uid=0, gid=0)

    assert errors == [errno.EPERM] * 32


def test_the_capture_needs_no_process_of_ours(bed: Bed, family: str) -> None:
    """Programs, maps and links stay in the kernel when the process that enrolled is gone."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    serve(c)
    mesh = BpfMesh(bed, a, b)

    def enrol() -> dict[str, object]:
        mesh.prepare()
        mesh.capture()
        return mesh.recorded

    mesh.recorded = bed.node.run(enrol, uid=0, gid=0)
    mesh.listen()

    assert a.run(apps.request, at(c, family)).data == b"hello"
    assert [s.port for s in mesh.intercepted()] == [OUTBOUND_PORT]
    mesh.release()
