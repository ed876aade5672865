"""Backend `tc` captures what a pod forwards: its apps may have no socket in the pod at all."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from pyambient.model.numbers import OUTBOUND_PORT
from tests.bed import Bed, BedPod, ClientOptions, apps, capturing
from tests.bed.nested import nested, route_to

from .bpf_mesh import PORT, BpfMesh, at, serve

pytestmark = pytest.mark.usefixtures("kernel")
_MARKER = b"bytes from behind the pod"


@pytest.fixture(params=["routed", "masqueraded"])
def inner(request: pytest.FixtureRequest, bed: Bed) -> Iterator[BedPod]:
    """A namespace behind pod a, under addresses of its own or under those of the pod."""
    bed.pod("a"), bed.pod("b"), bed.pod("c")
    with nested(bed.pods["a"], masquerade=request.param == "masqueraded") as made:
        if request.param == "routed":
            route_to(made, bed.pods["c"], by=bed.pods["a"])
        yield made


@pytest.fixture
def mesh(bed: Bed, inner: BedPod, monkeypatch: pytest.MonkeyPatch) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c is outside the mesh."""
    monkeypatch.setattr(BpfMesh, "backend", "tc")
    with BpfMesh(bed, bed.pods["a"], bed.pods["b"]) as made:
        yield made


def test_a_forwarded_connection_is_captured(mesh: BpfMesh, inner: BedPod, family: str) -> None:
    """The app behind the pod is answered by the proxy; nothing of it leaves the pod itself."""
    outside = mesh.bed.pods["c"]
    there = at(outside, family)
    echo = serve(outside)

    with capturing(mesh.bed.pods["a"]) as capture:
        exchange = inner.run(apps.request, there, _MARKER)

    assert (exchange.data, exchange.errno, exchange.peer) == (_MARKER, None, there)
    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, there)]
    (accepted,) = echo.ask("accepted")
    (proxied,) = {p.source for p in capture.packets if p.destination == there}
    assert accepted.peer == proxied
    assert proxied.ip == mesh.bed.pods["a"].address(family)


def test_much_is_forwarded(mesh: BpfMesh, inner: BedPod, family: str) -> None:
    """A megabyte each way, in segments as large as offloads make them."""
    serve(mesh.bed.pods["c"])
    data = bytes(range(256)) * 4096

    assert inner.run(apps.request, at(mesh.bed.pods["c"], family), data).data == data


def test_a_forwarded_connection_is_refused_at_once(
    mesh: BpfMesh, inner: BedPod, family: str
) -> None:
    """Without the proxy the app behind the pod gets a RST, and nothing leaves."""
    serve(mesh.bed.pods["c"])
    assert mesh.proxy is not None
    mesh.proxy.child.kill()

    with capturing(mesh.bed.pods["a"]) as capture:
        exchange = inner.run(apps.request, at(mesh.bed.pods["c"], family))

    assert (exchange.stage, exchange.errno) == ("connect", errno.ECONNREFUSED)
    assert [str(p) for p in capture.packets if PORT in p.ports] == []


def test_forwarded_connections_from_before_go_on(bed: Bed, inner: BedPod, family: str) -> None:
    """What was forwarded before the enrolment is so afterwards."""
    a, b, c = (bed.pods[name] for name in "abc")
    serve(c)
    held = inner.spawn(apps.hold, at(c, family), 3)
    assert held.receive() == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BpfMesh, "backend", "tc")
        with BpfMesh(bed, a, b) as mesh:
            assert held.ask("ping") == {}
            assert mesh.intercepted() == []
    assert held.ask("ping") == {}


def test_what_is_left_of_a_captured_one_does_not_leave(
    mesh: BpfMesh, inner: BedPod, family: str
) -> None:
    """The proxy gone, the bytes of a connection that it had are not let past."""
    serve(mesh.bed.pods["c"])
    held = inner.spawn(apps.hold, at(mesh.bed.pods["c"], family), 1)
    assert held.receive() == {}
    assert mesh.proxy is not None
    mesh.proxy.child.kill()

    with capturing(mesh.bed.pods["a"]) as capture:
        assert held.ask("ping") != {}

    assert [str(p) for p in capture.packets if PORT in p.ports and p.payload] == []


def test_datagrams_are_forwarded(mesh: BpfMesh, inner: BedPod, family: str) -> None:
    """UDP is forwarded as before."""
    udp = mesh.bed.pods["c"].spawn(apps.udp_echo, PORT)
    assert udp.receive() == "listening"
    options = ClientOptions(timeout=5)
    assert inner.run(apps.udp_request, at(mesh.bed.pods["c"], family), options=options).data
