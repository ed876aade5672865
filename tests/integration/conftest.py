"""Two enrolled pods with apps in them, the setting of most integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from tests.bed import Bed, BedPod, Capture, CgroupTree, Child, Mesh, Packet, apps

_NAMES = ("client", "server", "outside")


@dataclass(frozen=True, slots=True)
class Pair:
    """A client's and a server's pod, for the mesh, and one outside of it."""

    bed: Bed
    mesh: Mesh
    backend: str
    client: BedPod
    server: BedPod
    outside: BedPod

    def enroll(self) -> None:
        """Enrol both pods."""
        for pod in (self.client, self.server):
            self.mesh.enroll(pod, backend=self.backend)

    def serve(self, pod: BedPod, port: int, host: str = "::", *, at_eof: bool = False) -> Child:
        """An echo server that listens; leave its block to end it."""
        child = pod.spawn(apps.echo_server, port, host, at_eof=at_eof)
        assert child.receive() == "listening"
        return child


def between(packets: list[Packet], one: BedPod, other: BedPod) -> list[Packet]:
    """The packets that went from one pod to the other or back, in either family."""
    ends = ({one.ipv4, one.ipv6}, {other.ipv4, other.ipv6})
    return [
        packet
        for packet in packets
        if (packet.source.ip in ends[0] and packet.destination.ip in ends[1])
        or (packet.source.ip in ends[1] and packet.destination.ip in ends[0])
    ]


def assert_all_tunnelled(capture: Capture, one: BedPod, other: BedPod, marker: bytes) -> None:
    """All between the pods was HBONE, there was some, and no packet at all held `marker`."""
    packets = between(capture.packets, one, other)
    assert packets, "nothing was captured between the pods"
    assert [str(packet) for packet in packets if HBONE_PORT not in packet.ports] == []
    assert [str(packet) for packet in capture.packets if marker in packet.payload] == []


@pytest.fixture(scope="module")
def pair(
    cgroup_tree: CgroupTree,
    backend: str,
    mesh_settings: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    """A mesh with two enrolled pods, shared by the tests of a module that change neither."""
    directory = tmp_path_factory.mktemp(backend)
    with Bed(cgroup_tree) as bed, Mesh(bed, directory, **mesh_settings) as mesh:
        made = Pair(bed, mesh, backend, *(bed.pod(name) for name in _NAMES))
        made.enroll()
        yield made


@pytest.fixture
def strangers(bed: Bed, mesh: Mesh, backend: str) -> Pair:
    """A mesh of the test's own with the same pods, none of them enrolled yet."""
    return Pair(bed, mesh, backend, *(bed.pod(name) for name in _NAMES))


@pytest.fixture
def destination(pair: Pair, family: str) -> SocketAddress:
    """Where an echo server of the server's pod listens for this test."""
    return SocketAddress(pair.server.address(family), 8080)


@pytest.fixture
def echo(pair: Pair) -> Iterator[Child]:
    """The server's app, on port 8080 of both families."""
    with pair.serve(pair.server, 8080) as server:
        yield server
