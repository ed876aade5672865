"""Health probes of the node: known by the socket that sent them, never by their address."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT, INBOUND_PORT
from tests.bed import Bed, BedPod, apps

from .bpf_mesh import PORT, BpfMesh, at, serve

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture
def mesh(bed: Bed) -> Iterator[BpfMesh]:
    """Pods a and b enrolled."""
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        yield made


def test_a_probe_reaches_the_app(mesh: BpfMesh, family: str) -> None:
    """Directly, from the node's own address, and the app's answer reaches the node."""
    a, node = mesh.bed.pods["a"], mesh.bed.node
    echo = serve(a)

    seen = node.run(apps.request, at(a, family), b"alive?")

    assert (seen.data, seen.errno) == (b"alive?", None)
    assert mesh.intercepted() == []
    assert [one.peer for one in echo.ask("accepted")] == [seen.local]


def test_a_probe_of_a_closed_port_is_refused(mesh: BpfMesh, family: str) -> None:
    """By the pod itself: the probe fails as it would without a mesh."""
    seen = mesh.bed.node.run(apps.request, at(mesh.bed.pods["a"], family), b"alive?")
    assert seen.errno is not None
    assert mesh.intercepted() == []


def test_the_nodes_address_proves_nothing(mesh: BpfMesh, masqueraded: BedPod, family: str) -> None:
    """What the node masquerades comes from its address and goes to the proxy, probes or not."""
    a, node = mesh.bed.pods["a"], mesh.bed.node
    serve(a)
    node.run(apps.request, at(a, family), b"alive?")

    masqueraded.run(apps.request, at(a, family), b"alive?")

    (seen,) = mesh.intercepted()
    assert (seen.pod, seen.port, seen.original) == ("a", INBOUND_PORT, at(a, family))
    assert seen.peer.ip == node.address(family)


def test_another_pod_is_no_node(mesh: BpfMesh, family: str) -> None:
    """Whoever has a network namespace of its own is a client like any other."""
    stranger, a = mesh.bed.pod("stranger"), mesh.bed.pods["a"]
    serve(a)
    stranger.run(apps.request, at(a, family), b"alive?")
    assert [one.port for one in mesh.intercepted()] == [INBOUND_PORT]


def test_the_node_comes_by_hbone_where_it_means_to(mesh: BpfMesh, family: str) -> None:
    """15008 is the proxy's for whoever connects; no probe goes there."""
    a = mesh.bed.pods["a"]
    mesh.bed.node.run(apps.request, SocketAddress(a.address(family), HBONE_PORT), b"hello")
    assert [one.port for one in mesh.intercepted()] == [HBONE_PORT]


def test_probes_of_two_pods(mesh: BpfMesh, family: str) -> None:
    """Each reaches its own app, one after the other from one source port."""
    a, b, node = mesh.bed.pods["a"], mesh.bed.pods["b"], mesh.bed.node
    for pod in (a, b):
        serve(pod)
        assert node.run(apps.request, at(pod, family, PORT), b"alive?").data == b"alive?"
    assert mesh.intercepted() == []
