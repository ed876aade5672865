"""What an app can make of a socket that was excluded, and of a port that is, with `bpf` and `tc`.

Nothing: the exclusion is of one connection, and is decided when it begins.
"""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator

import pytest

from pyambient.intercept.options import CaptureOptions
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import OUTBOUND_PORT
from tests.bed import Bed, BedPod, Channel, capturing, marking

from .bpf_mesh import PORT, BpfMesh, at, serve

pytestmark = pytest.mark.usefixtures("kernel", "bpf_backend")
_MARKER = b"bytes that must not be on the wire"
_EXCLUDED_PORT = 9090


@pytest.fixture
def pods(bed: Bed) -> dict[str, BedPod]:
    """Pods a and b to be enrolled, c that a excludes, d that nobody does."""
    return {name: bed.pod(name) for name in "abcd"}


@pytest.fixture
def mesh(bed: Bed, pods: dict[str, BedPod]) -> Iterator[BpfMesh]:
    for name in "cd":
        serve(pods[name])
    made = BpfMesh(bed, pods["a"], pods["b"])
    excluded = ",".join((pods["c"].address("v4"), pods["c"].address("v6")))
    made.options["a"] = CaptureOptions.from_json(
        {
            "outbound": {"exclude_cidrs": excluded},
            "inbound": {"exclude_ports": str(_EXCLUDED_PORT)},
        }
    )
    with made:
        yield made


def _dissolve(connected: socket.socket) -> None:
    """An address of family AF_UNSPEC ends the association (connect(2))."""
    assert ctypes.CDLL(None).connect(connected.fileno(), bytes(16), 16) == 0


def _connect_in_turn(*destinations: SocketAddress) -> list[bytes]:
    answers = []
    with socket.socket(destinations[0].family) as client:
        for destination in destinations:
            client.connect(destination.sockaddr())
            client.sendall(b"hello")
            answers.append(client.recv(100))
            _dissolve(client)
    return answers


def test_a_socket_that_connects_again_is_judged_again(
    mesh: BpfMesh, pods: dict[str, BedPod], family: str
) -> None:
    """Past the proxy to what is excluded, by it to what is not, and past it once more."""
    c, d = at(pods["c"], family), at(pods["d"], family)
    assert pods["a"].run(_connect_in_turn, c, d, c) == [b"hello"] * 3
    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, d)]


def _send_from(port: int, destination: SocketAddress) -> bytes:
    """What comes back of the marker, which is sent without the mark of a captured socket."""
    with socket.socket(destination.family) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.bind(("", port))
        client.settimeout(5)
        client.connect(destination.sockaddr())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
        client.sendall(_MARKER)
        client.settimeout(1)
        try:
            return client.recv(100)
        except TimeoutError:
            return b""


def test_an_excluded_port_is_no_way_out(
    mesh: BpfMesh, pods: dict[str, BedPod], family: str
) -> None:
    """An app that connects from it is captured; by another mark it gets nothing past the proxy.

    With `bpf` the guard drops that; with `tc`, which knows no marks, it goes to the proxy.
    """
    a, d = pods["a"], at(pods["d"], family)
    with capturing(pods["d"]) as capture:
        heard = a.run(_send_from, _EXCLUDED_PORT, d, capabilities=marking(a))
    assert heard == (_MARKER if mesh.backend == "tc" else b"")
    assert [str(p) for p in capture.packets if p.payload and _EXCLUDED_PORT in p.ports] == []
    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, d)]


def _listen_once_excluded(channel: Channel, excluded: SocketAddress) -> None:
    with socket.socket(excluded.family) as server:
        server.connect(excluded.sockaddr())
        _dissolve(server)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", PORT))
        server.listen()
        channel.send("listening")
        accepted, _ = server.accept()
        with accepted:
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0)
            accepted.sendall(_MARKER)
            channel.receive()


def _visit(destination: SocketAddress) -> None:
    with socket.socket(destination.family) as client:
        client.settimeout(5)
        client.connect(destination.sockaddr())
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.recv(100)


def test_what_is_accepted_inherits_no_exclusion(
    mesh: BpfMesh, pods: dict[str, BedPod], family: str
) -> None:
    """A socket that was excluded and listens now accepts connections of the mesh's."""
    a = pods["a"]
    listening = a.spawn(_listen_once_excluded, at(pods["c"], family), capabilities=marking(a))
    assert listening.receive() == "listening"
    with capturing(pods["d"]) as capture:
        pods["d"].run(_visit, at(a, family))
    assert not any(_MARKER in frame for frame in capture.frames)


def _speak_when_told(channel: Channel, family: int) -> None:
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", _EXCLUDED_PORT))
        server.listen()
        channel.send("listening")
        accepted, _ = server.accept()
        with accepted:
            channel.send("accepted")
            channel.receive()
            accepted.sendall(b"late")
            channel.send("sent")
            channel.receive()


def _wait_for_greeting(channel: Channel, destination: SocketAddress) -> None:
    with socket.socket(destination.family) as client:
        client.settimeout(10)
        client.connect(destination.sockaddr())
        channel.send(client.recv(100))


def test_a_silent_connection_keeps_its_decision_too(
    mesh: BpfMesh, pods: dict[str, BedPod], family: str
) -> None:
    """Accepted while its port was excluded, an app speaks first when it no longer is."""
    a, d = pods["a"], pods["d"]
    destination = at(a, family, _EXCLUDED_PORT)
    server = a.spawn(_speak_when_told, destination.family)
    assert server.receive() == "listening"
    client = d.spawn(_wait_for_greeting, destination)
    assert server.receive() == "accepted"
    mesh.options["a"] = CaptureOptions()
    mesh.refresh(a)
    server.send("speak")
    assert (server.receive(), client.receive()) == ("sent", b"late")
    assert mesh.intercepted() == []


def test_a_flooded_port_is_reached_all_the_same(
    mesh: BpfMesh, pods: dict[str, BedPod], family: str
) -> None:
    """A listener that answers with SYN cookies has no socket yet that could be asked."""
    a, d = pods["a"], pods["d"]
    a.command("sysctl", "-w", "net.ipv4.tcp_syncookies=2")
    serve(a, _EXCLUDED_PORT)
    assert d.run(_connect_in_turn, at(a, family, _EXCLUDED_PORT)) == [b"hello"]
    assert mesh.intercepted() == []
