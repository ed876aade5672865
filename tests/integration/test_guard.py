"""The leak guard on pods of the test's own: forwarded flows, the node's part, a lost guard."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pyambient.intercept.kernel_objects import Link
from pyambient.model.address import SocketAddress
from tests.bed import Bed, Capability, Network, apps, capturing
from tests.bed.apps import ClientOptions
from tests.bed.forging import Forged, Frame, send_frames, send_tcp

from .conftest import Pair
from .guard import MARKER, guard_of, log_lines, nothing_arrives

pytestmark = pytest.mark.parametrize("backend", ["bpf"], scope="module")

_RAW = [Capability.NET_RAW]


def test_a_flow_that_the_pod_forwards(bed: Bed, strangers: Pair, family: str) -> None:
    """A namespace behind a pod has no socket in it: its TCP is dropped, its UDP passes."""
    client, outside, mesh = strangers.client, strangers.outside, strangers.mesh
    behind = bed.add_network(Network("br-in", "10.99.0", "fd99::", node_is_router=False))
    ipv4, ipv6 = bed.add_device(client, "eth1", behind)
    inner = bed.pod("inner", network=behind)
    client.command("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    inner.ip(f"route add default via {ipv4}", f"route add ::/0 via {ipv6}")
    outside.ip(
        f"route add 10.99.0.0/24 via {client.ipv4}", f"route add fd99::/64 via {client.ipv6}"
    )
    there = SocketAddress(outside.address(family), 8080)
    with strangers.serve(outside, there.port):
        assert inner.run(apps.request, there).data == b"hello"
        mesh.enroll(client, backend="bpf")
        with capturing(outside) as capture:
            seen = inner.run(apps.request, there, MARKER, options=ClientOptions(timeout=2))
            inner.run(_datagram, there)
        assert client.run(apps.request, there).data == b"hello"
    assert seen.failed
    udp, tcp = socket.IPPROTO_UDP, socket.IPPROTO_TCP
    protocols = {p.protocol for p in capture.packets if p.source.ip == inner.address(family)}
    assert (udp in protocols, tcp in protocols) == (True, False)
    assert set(guard_of(mesh, client)["dropped"]) == {"forwarded"}


def _datagram(there: SocketAddress) -> None:
    with socket.socket(there.family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"a datagram", there.sockaddr())


def test_what_bypasses_tc_stops_on_the_node(strangers: Pair, family: str) -> None:
    """With --guard-node; the connections of the mesh go on, and the pod's name is in the log."""
    client, server, outside, mesh = (
        strangers.client, strangers.server, strangers.outside, strangers.mesh,
    )  # fmt: skip
    mesh.enroll(server, backend="bpf")
    mesh.enroll(client, backend="bpf")
    mesh.cli("set", client.name, "--guard-node")
    there = SocketAddress(outside.address(family), 80)
    packet = Forged(SocketAddress(client.address(family), 4711), there, payload=MARKER).packet()
    kind = 0x86DD if family == "v6" else 0x0800
    with nothing_arrives(outside):
        client.run(send_frames, Frame(b"\xff" * 6, kind, kind), [packet], bypass=True,
                   capabilities=_RAW)  # fmt: skip
    assert guard_of(mesh, client)["dropped"] == {"unsigned": 1}
    mesh.wait_until(lambda: log_lines(mesh, client, "guard"), "line of the guard")
    with strangers.serve(server, 8080):
        seen = client.run(apps.request, SocketAddress(server.address(family), 8080))
    assert seen.data == b"hello"


def test_a_guard_that_is_taken_away_comes_back(strangers: Pair, family: str) -> None:
    """Root who gets at the link detaches it; found in a round, put back, counted and logged."""
    client, outside, mesh = strangers.client, strangers.outside, strangers.mesh
    mesh.enroll(client, backend="bpf")
    (pin,) = Path("/sys/fs/bpf").rglob("guard-eth0")

    def attached() -> bool:
        with Link.open_pinned(pin) as link:
            return link.info().target != 0

    with Link.open_pinned(pin) as link:
        link.detach()
    mesh.wait_until(lambda: pin.exists() and attached(), "guard put back")
    assert guard_of(mesh, client)["dropped"] == {}
    source = SocketAddress(client.address(family), 4711)
    segment = Forged(source, SocketAddress(outside.address(family), 80), payload=MARKER)
    with nothing_arrives(outside):
        client.run(send_tcp, segment, capabilities=_RAW)
    (line,) = log_lines(mesh, client, "upkeep")
    assert (line["message"], line["why"]) == ("repaired", "no guard on eth0")
