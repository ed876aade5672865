"""What the leak guard lets out: connections from before, the kernel's own answers, no TCP."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterator

import pytest

from pyambient.intercept.existing import existing_connections
from pyambient.intercept.loader import Constants
from pyambient.model.address import SocketAddress
from tests.bed import Bed, BedPod, Capability, Channel, Child, apps, capturing, marking
from tests.bed.capture import TCP_ACK, TCP_RST
from tests.bed.forging import ACK, Forged, send_tcp
from tests.bed.network import command
from tests.bed.patience import patience, wait_for

from .bpf_mesh import PORT, BpfMesh, at, drops_of, serve

_MARKER = b"from before"


@pytest.fixture
def pods(bed: Bed) -> tuple[BedPod, BedPod, BedPod]:
    return bed.pod("a"), bed.pod("b"), bed.pod("outside")


@pytest.fixture
def mesh(bed: Bed, kernel: Constants, pods) -> Iterator[BpfMesh]:
    """Pods a and b, enrolled."""
    del kernel
    with BpfMesh(bed, *pods[:2]) as made:
        yield made


@pytest.fixture
def enrolled() -> Iterator[contextlib.ExitStack]:
    """What is entered here ends with the test."""
    with contextlib.ExitStack() as stack:
        yield stack


def dropped(pod: BedPod) -> dict[str, int]:
    return {reason: count for reason, count in drops_of(pod).counts.items() if count}


def keep_talking(channel: Channel, destination: SocketAddress) -> None:
    """A client with one connection: it sends what it is told to and tells what comes back."""
    with socket.create_connection((destination.ip, destination.port), timeout=30) as client:
        channel.send("connected")
        while (message := channel.receive()) != "close":
            client.sendall(message)
            channel.send(client.recv(100))


def connected(pod: BedPod, destination: SocketAddress) -> Child:
    child = pod.spawn(keep_talking, destination)
    assert child.receive() == "connected"
    return child


@pytest.mark.parametrize("accepts", [False, True], ids=["opened", "accepted"])
def test_a_connection_from_before_lives_on(bed, kernel, pods, family, accepts):
    """Through enrolment and un-enrolment alike; it never meets the proxy."""
    del kernel
    a, b, outside = pods
    client, server = (outside, a) if accepts else (a, outside)
    with serve(server):
        child = connected(client, at(server, family))
        with BpfMesh(bed, a, b) as mesh, capturing(a) as capture:
            assert child.ask(_MARKER) == _MARKER
            assert mesh.intercepted() == []
            assert dropped(a) == {}
        assert child.ask(_MARKER) == _MARKER
    assert any(_MARKER in frame for frame in capture.frames)


@pytest.mark.parametrize("accepts", [False, True], ids=["opening", "accepting"])
def test_a_connection_in_the_making_is_completed(bed, enrolled, pods, family, accepts):
    """Its SYN left before the enrolment, the rest comes after it."""
    a, b, outside = pods
    client, server = (outside, a) if accepts else (a, outside)
    client.run(_datagram, at(server, family, 9), b"so that both know each other's MAC")
    enrolled.enter_context(serve(server))
    with nothing_gets_to(client):
        child = client.spawn(keep_talking, at(server, family))
        wait_for(lambda: existing_connections(a.netns))
        mesh = enrolled.enter_context(BpfMesh(bed, a, b))
    assert child.receive() == "connected"
    assert child.ask(_MARKER) == _MARKER
    assert (mesh.intercepted(), dropped(a)) == ([], {})


@contextlib.contextmanager
def nothing_gets_to(pod: BedPod) -> Iterator[None]:
    """The bridge has nothing for it during the block."""
    device = ("dev", pod.veths["eth0"])
    command("tc", "qdisc", "add", *device, "clsact")
    shot = ("bpf", "da", "bytecode", "1,6 0 0 2")
    command("tc", "filter", "add", *device, "egress", *shot)
    yield
    command("tc", "qdisc", "del", *device, "clsact")


def test_a_socket_from_before_that_connects_again_is_captured(bed, pods, family):
    """Its connection was from before, the socket is nobody's free ticket."""
    a, b, outside = pods

    def connects_twice(channel: Channel, destination: SocketAddress, mark: int) -> None:
        with socket.socket(destination.family) as client:
            client.settimeout(30)
            client.connect(destination.sockaddr())
            channel.send("connected")
            channel.receive()
            _disconnect(client)
            client.connect(destination.sockaddr())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            client.sendall(_MARKER)
            channel.send("sent")
            channel.receive()

    with serve(outside):
        child = a.spawn(connects_twice, at(outside, family), 0, capabilities=marking(a))
        assert child.receive() == "connected"
        with BpfMesh(bed, a, b), capturing(outside) as capture:
            assert child.ask("again") == "sent"
            wait_for(lambda: dropped(a))
            assert set(dropped(a)) == {"captured"}
            child.send("close")
    assert not any(_MARKER in frame for frame in capture.frames)


def _datagram(to: SocketAddress, data: bytes) -> None:
    with socket.socket(to.family, socket.SOCK_DGRAM) as sock:
        sock.sendto(data, to.sockaddr())


def _disconnect(client: socket.socket) -> None:
    """connect() to AF_UNSPEC, which the socket module has no address for."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(client.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16) == 0


def test_the_kernel_refuses_a_stray_segment(mesh, pods, family):
    """The reset for a segment of no connection has no socket; it gets out."""
    a, _, outside = pods
    stray = Forged(at(outside, family, 4711), at(a, family, 4712), ACK)
    with capturing(outside) as capture:
        outside.run(send_tcp, stray, capabilities=[Capability.NET_RAW])
    resets = [p for p in capture.packets if p.flags & TCP_RST and p.ports == (4712, 4711)]
    assert len(resets) == 1
    assert dropped(a) == {}
    del mesh


def test_time_wait_answers(mesh, pods, family):
    """A segment for a connection of the proxy's that is in TIME-WAIT is acknowledged."""
    a, _, outside = pods
    there = at(a, family)

    def farewell(channel: Channel) -> None:
        with apps.listener(PORT) as listening:
            channel.send("listening")
            listening.accept()[0].close()

    def visit() -> int:
        with socket.create_connection((there.ip, there.port), timeout=30) as client:
            assert client.recv(100) == b""
            return int(client.getsockname()[1])

    assert a.spawn(farewell).receive() == "listening"
    port = outside.run(visit)
    with capturing(outside) as capture:
        stray = Forged(at(outside, family, port), there, ACK)
        outside.run(send_tcp, stray, capabilities=[Capability.NET_RAW])
    answers = [packet.flags for packet in capture.packets if packet.ports == (PORT, port)]
    assert (answers, dropped(a)) == ([TCP_ACK], {})
    del mesh


def test_fragments_of_udp_pass(mesh, pods, family):
    """What is provably no TCP is not judged, in as many parts as it comes."""
    a, _, outside = pods
    data = bytes(4000) + _MARKER

    def receiver(channel: Channel) -> bytes:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
            server.bind(("::", 9000))
            server.settimeout(patience(10))
            channel.send("bound")
            return server.recv(1 << 16)

    child = outside.spawn(receiver)
    assert child.receive() == "bound"
    a.run(_datagram, at(outside, family, 9000), data)
    assert child.wait() == data
    assert dropped(a) == {}
    del mesh
