"""What stands in for features that older kernels lack; each of these works on later ones, too."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyambient.intercept import lo_filter, probe, runner
from pyambient.intercept.loader import Constants
from pyambient.intercept.netns_cookie import ask_by_connect
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import INBOUND_PORT, LOOPBACK_MARK
from tests.bed import Bed, BedPod, Capability, apps
from tests.bed.snapshot import kernel_state

from .bpf_mesh import BpfMesh, at, serve, target

_SYN_RECV = "03"
_TCP_SYN = 0x02


@pytest.fixture
def mesh(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> Iterator[BpfMesh]:
    """Pods a and b enrolled with what Linux 5.10 has; pod c of the bed is outside the mesh."""
    monkeypatch.setattr(probe, "constants", lambda _: Constants())
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        bed.pod("c")
        yield made


def test_the_cookie_by_a_connect(bed: Bed) -> None:
    """The hook tells each namespace its own cookie: the kernel's, where it tells that as well."""
    a, b = bed.pod("a"), bed.pod("b")

    asked = [ask_by_connect(pod.netns, bed.cgroup.path) for pod in (a, b, a)]

    assert asked[0] == asked[2] != asked[1]
    for pod, cookie in zip((a, b), asked, strict=False):
        with pod.netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            try:
                (told,) = struct.unpack("=Q", any_socket.getsockopt(socket.SOL_SOCKET, 71, 8))
            except OSError:  # Linux 5.10
                told = cookie
        assert cookie == told


def test_asking_leaves_nothing(bed: Bed) -> None:
    """The cgroup made for the moment goes, and with it the hook."""
    pod = bed.pod("a")
    before = bed.cgroup.directories(), kernel_state(pod)

    ask_by_connect(pod.netns, bed.cgroup.path)

    assert (bed.cgroup.directories(), kernel_state(pod)) == before


def test_a_client_from_the_proxys_own_port(mesh: BpfMesh, family: str) -> None:
    """A client that uses the source port the proxy has just used to the app is captured."""
    b, c = mesh.bed.pods["b"], mesh.bed.pods["c"]
    echo = serve(b)
    assert c.run(apps.request, at(b, family)).data == b"hello"
    (upstream,) = [accepted.peer for accepted in echo.ask("accepted")]

    assert c.run(_request_from, upstream, at(b, family)) == b"again"

    assert [(s.port, s.peer.port == upstream.port) for s in mesh.intercepted()] == [
        (INBOUND_PORT, False),
        (INBOUND_PORT, True),
    ]


def _request_from(source: SocketAddress, destination: SocketAddress) -> bytes:
    with socket.socket(destination.family, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.bind(source.sockaddr())
        client.connect(destination.sockaddr())
        client.sendall(b"again")
        client.shutdown(socket.SHUT_WR)
        return client.recv(100)


def test_without_the_filter_nothing_comes_in(mesh: BpfMesh, family: str) -> None:
    """Where the filter on lo is gone the proxy's SYN is refused, not captured again and again."""
    b, c = mesh.bed.pods["b"], mesh.bed.pods["c"]
    echo = serve(b)
    lo_filter.remove_qdisc(b.netns)

    exchange = c.run(apps.request, at(b, family), b"lost")

    assert (exchange.failed, echo.ask("accepted")) == (True, [])
    assert [s.failure for s in mesh.intercepted()] == [errno.ECONNREFUSED]


def _remove_filter(pod: BedPod) -> None:
    lo_filter.detach(pod.netns)


def _remove_qdisc(pod: BedPod) -> None:
    lo_filter.remove_qdisc(pod.netns)


@pytest.mark.parametrize(
    ("damage", "kinds"),
    [
        (_remove_filter, ["tc-note"]),
        (_remove_qdisc, ["tc-note"]),
    ],
    ids=lambda value: getattr(value, "__name__", "").lstrip("_"),
)
def test_damage_is_found_and_repaired(
    mesh: BpfMesh, damage: Callable[[BedPod], None], kinds: list[str]
) -> None:
    """What is missing is noticed; that alone applied again, connections come in again."""
    b, c = mesh.bed.pods["b"], mesh.bed.pods["c"]
    serve(b)
    damage(b)
    lost = [step for step in mesh.recorded["b"] if step.missing(target(b))]
    assert [step.kind for step in lost] == kinds

    runner.apply_stages(target(b), lost)

    assert runner.verify(target(b), mesh.recorded["b"]) == []
    assert c.run(apps.request, at(b, "v4")).data == b"hello"


def _syn(source: SocketAddress, destination: SocketAddress) -> bytes:
    """An IPv4 packet that opens a connection; the kernel fills in the header's checksum."""
    ends = socket.inet_aton(source.ip) + socket.inet_aton(destination.ip)
    segment = struct.pack(
        "!HHIIBBHHH", source.port, destination.port, 1, 0, 5 << 4, _TCP_SYN, 65535, 0, 0
    )
    total = sum(struct.unpack("!16H", ends + struct.pack("!HH", 6, len(segment)) + segment))
    total = (total & 0xFFFF) + (total >> 16)
    segment = (
        segment[:16]
        + struct.pack(
            "!H",
            ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF,
        )
        + b"\0\0"
    )
    header = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0)
    return header + ends + segment


def _send_raw(destination: SocketAddress, marks: list[int]) -> set[int]:
    """Send a SYN per mark from 203.0.113.7, each from the next port; ports that are answered.

    Waits for the last one, which must be answered.
    """
    for port, mark in enumerate(marks, start=40000):
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            source = SocketAddress("203.0.113.7", port)
            raw.sendto(_syn(source, destination), (destination.ip, 0))
    deadline = time.monotonic() + 10
    while (last := 40000 + len(marks) - 1) not in (answered := _half_open(destination.port)):
        assert time.monotonic() < deadline, f"{last} not in {answered}"
    return answered


def _half_open(port: int) -> set[int]:
    """The peers' ports of connections to `port` that wait for the last ACK (proc_net_tcp(5))."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            _, local, remote, state, *_ = line.split()
            if state == _SYN_RECV and int(local.rpartition(":")[2], 16) == port:
                found.add(int(remote.rpartition(":")[2], 16))
    return found


def test_a_forged_mark_on_lo_is_not_the_proxys(mesh: BpfMesh) -> None:
    """A SYN on lo that an app marked as the proxy's are does not reach an app past the proxy.

    CAP_NET_ADMIN sets marks on every kernel, CAP_NET_RAW since 5.17.
    """
    b, c = mesh.bed.pods["b"], mesh.bed.pods["c"]
    serve(b)
    serve(c)
    able = [Capability.NET_RAW, Capability.NET_ADMIN]

    outside = c.run(_send_raw, at(c, "v4"), [LOOPBACK_MARK, 0], capabilities=able)
    enrolled = b.run(_send_raw, at(b, "v4"), [LOOPBACK_MARK, 0], capabilities=able)

    assert outside == {40000, 40001}
    assert enrolled == {40001}


def test_a_qdisc_of_others_stays(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lo has a place for filters already, that place outlives us."""
    monkeypatch.setattr(probe, "constants", lambda _: Constants())
    a, b = bed.pod("a"), bed.pod("b")
    a.command("tc", "qdisc", "add", "dev", "lo", "clsact")
    before = kernel_state(a, b)

    with BpfMesh(bed, a, b):
        assert kernel_state(a, b) != before

    assert kernel_state(a, b) == before
