"""Enrolment and un-enrolment of living pods: what breaks (nothing) and what is left (nothing)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from tests.bed import (
    Bed,
    BedPod,
    Child,
    ClientOptions,
    Mesh,
    Network,
    Twin,
    apps,
    capturing,
    changes,
    kernel_state,
)

from .conftest import Pair, assert_all_tunnelled

_MARKER = b"plaintext that must not be on the wire"


@pytest.fixture
def echo(strangers: Pair) -> Iterator[Child]:
    """The server's app, on port 8080 of both families."""
    with strangers.serve(strangers.server, 8080) as server:
        yield server


def test_connections_from_before_survive(strangers: Pair, echo: Child, family: str) -> None:
    """Whoever opened them, they answer while the pods are enrolled and when they no longer are."""
    client, server = strangers.client, strangers.server
    with (
        strangers.serve(client, 8080),
        client.spawn(apps.hold, SocketAddress(server.address(family), 8080), 5) as out,
        server.spawn(apps.hold, SocketAddress(client.address(family), 8080), 5) as back,
    ):
        assert (out.receive(), back.receive()) == ({}, {})
        strangers.enroll()
        assert (out.ask("ping"), back.ask("ping")) == ({}, {})
        with capturing(client) as capture:
            there = SocketAddress(server.address(family), 8080)
            assert client.run(apps.request, there, _MARKER).data == _MARKER
        assert [str(packet) for packet in capture.packets if _MARKER in packet.payload] == []
        for pod in (client, server):
            strangers.mesh.unenroll(pod)
        assert (out.ask("ping"), back.ask("ping")) == ({}, {})


def test_relayed_connections_survive_the_drain(strangers: Pair, echo: Child, family: str) -> None:
    """While a pod drains its relayed connections go on, and those it opens now are direct."""
    client = strangers.client
    strangers.enroll()
    there = SocketAddress(strangers.server.address(family), 8080)
    beyond = SocketAddress(strangers.outside.address(family), 8080)
    with (
        strangers.serve(strangers.outside, 8080) as other,
        client.spawn(apps.hold, there, 20) as on,
    ):
        assert on.receive() == {}
        assert not _is_direct(client, other, beyond)
        freeing = strangers.mesh.start_unenrolling(client)
        strangers.mesh.wait_until(lambda: _is_direct(client, other, beyond), "direct connection")
        for _ in range(3):
            assert _states(strangers.mesh) == {"client": "draining", "server": "enrolled"}
            assert on.ask("ping") == {}
        on.send("stop")
        on.wait()
        assert freeing.wait(timeout=20) == 0
        assert len(echo.ask("accepted")) == 20
    assert _states(strangers.mesh) == {"server": "enrolled"}


def _states(mesh: Mesh) -> dict[str, str]:
    """What `status` says of each pod."""
    return {pod["name"]: pod["state"] for pod in mesh.status()["pods"]}


def _is_direct(client: BedPod, server: Child, there: SocketAddress) -> bool:
    """Whether a server outside the mesh sees the very socket of a client that connects now."""
    seen = client.run(apps.request, there)
    assert seen.data == b"hello"
    return seen.local in [one.peer for one in server.ask("accepted")]


def test_nothing_is_left_behind(strangers: Pair, echo: Child, family: str) -> None:
    """Rules, routes, sysctls, programs, pins, chains, listeners: all as before, `up` running."""
    pods = (strangers.client, strangers.server)
    before = kernel_state(*pods)
    strangers.enroll()
    there = SocketAddress(strangers.server.address(family), 8080)
    assert strangers.client.run(apps.request, there).data == b"hello"
    enrolled = kernel_state(*pods)
    assert all(enrolled[pod.name] != before[pod.name] for pod in pods)
    for pod in pods:
        strangers.mesh.unenroll(pod)
    assert changes(before, kernel_state(*pods)) == []


def test_without_its_proxy_a_pod_is_closed(strangers: Pair, echo: Child, family: str) -> None:
    """After `up` has ended nothing gets past the mesh; started again, it serves the pods again."""
    there = SocketAddress(strangers.server.address(family), 8080)
    strangers.enroll()
    strangers.mesh.kill()
    with capturing(strangers.client) as capture:
        options = ClientOptions(timeout=1)
        assert strangers.client.run(apps.request, there, _MARKER, options).failed
    assert [str(one) for one in capture.packets if one.destination == there] == []
    strangers.mesh.start()
    strangers.mesh.wait_until(
        lambda: strangers.client.run(apps.request, there).data == b"hello", "answer"
    )


@pytest.mark.parametrize("backend", ["bpf", "tc"], scope="module")
def test_programs_of_the_node_that_are_gone_are_made_anew(
    strangers: Pair, echo: Child, family: str
) -> None:
    """Whoever removed their pins: nothing gets past the guards, then the proxy is known again."""
    client = strangers.client
    there = SocketAddress(strangers.server.address(family), 8080)
    strangers.enroll()
    options = ClientOptions(timeout=1)
    with capturing(client) as capture:
        for pin in Path("/sys/fs/bpf/pyambient/node").iterdir():
            pin.unlink()
        strangers.mesh.wait_until(
            lambda: client.run(apps.request, there, _MARKER, options).data == _MARKER, "answer"
        )
    # An app's bare SYN-ACK may get out, until the proxy's socket that it answers is known again.
    assert [str(p) for p in capture.packets if p.payload and HBONE_PORT not in p.ports] == []
    assert not any(_MARKER in packet.payload for packet in capture.packets)


def test_a_pod_is_freed_without_an_agent(strangers: Pair, echo: Child) -> None:
    """`unenroll` needs nobody's help: the record says what to undo."""
    pods = (strangers.client, strangers.server)
    before = kernel_state(*pods)
    strangers.enroll()
    assert strangers.mesh.stop() == 0
    for pod in pods:
        strangers.mesh.unenroll(pod)
    assert changes(before, kernel_state(*pods)) == []


def test_pods_with_one_address_never_meet(bed: Bed, mesh: Mesh, backend: str, family: str) -> None:
    """Two pods with equal addresses, both enrolled: one's traffic, or end, is not the other's."""
    twins = bed.twin_networks()
    for twin in twins:
        mesh.enroll(twin.pod, service_account="server", backend=backend)
        mesh.enroll(twin.peer, service_account="client", backend=backend)
    servers = [_serve_twin(twin) for twin in twins]
    there = SocketAddress(twins[0].pod.address(family), 8080)
    for twin, asked in zip(twins, ([1, 0], [1, 1]), strict=True):
        with capturing(twin.peer) as capture:
            assert twin.peer.run(apps.request, there, _MARKER).data == _MARKER
        assert_all_tunnelled(capture, twin.peer, twin.pod, _MARKER)
        assert [len(server.ask("accepted")) for server in servers] == asked
    (accepted,) = servers[0].ask("accepted")
    assert accepted.peer.ip == twins[0].peer.address(family)
    mesh.unenroll(twins[0].pod)
    with capturing(twins[1].peer) as capture:
        assert twins[1].peer.run(apps.request, there, _MARKER).data == _MARKER
    assert_all_tunnelled(capture, twins[1].peer, twins[1].pod, _MARKER)


def _serve_twin(twin: Twin) -> Child:
    server = twin.pod.spawn(apps.echo_server, 8080)
    assert server.receive() == "listening"
    return server


def _neighbour_beside(strangers: Pair, family: str) -> tuple[Network, SocketAddress]:
    """A second network with an enrolled server; the client is enrolled, and not on it yet."""
    side = strangers.bed.add_network(Network("br78", "10.78.0", "fd78::"))
    neighbour = strangers.bed.pod("neighbour", network=side)
    strangers.mesh.enroll(strangers.client, backend=strangers.backend)
    strangers.mesh.enroll(neighbour, backend=strangers.backend)
    strangers.serve(neighbour, 8080)
    return side, SocketAddress(neighbour.address(family), 8080)


@pytest.mark.parametrize("device", [None, "eth1"])
@pytest.mark.parametrize("backend", ["tc"], scope="module")
def test_a_device_is_captured_once_the_agent_has_seen_it(
    strangers: Pair, family: str, device: str | None
) -> None:
    """With `tc` capture is a matter of each device: nothing leaves by it from then on."""
    client, mesh = strangers.client, strangers.mesh
    side, there = _neighbour_beside(strangers, family)
    strangers.bed.add_device(client, "eth1", side)
    options = ClientOptions(device=device, timeout=1)

    def is_captured() -> bool:
        client.run(apps.request, there, options=options)
        known = {"direction": "outbound", "dst.hbone_addr": str(there)}
        return any(known.items() <= line.items() for line in mesh.lines())

    mesh.wait_until(is_captured, "captured connection")
    with capturing(client, "eth1") as capture:
        assert client.run(apps.request, there, _MARKER, options).data == _MARKER
    assert [str(one) for one in capture.packets if 8080 in one.ports] == []


@pytest.mark.parametrize(
    ("backend", "device"),
    [("bpf", None), ("bpf", "eth1"), ("nftables", None), ("iptables", None)],
    scope="module",
)
def test_a_device_that_comes_later_is_captured(
    strangers: Pair, family: str, device: str | None
) -> None:
    """A second device of an enrolled pod: nothing ever leaves by it past the mesh."""
    bed, client = strangers.bed, strangers.client
    side, there = _neighbour_beside(strangers, family)

    bed.add_device(client, "eth1", side)
    options = ClientOptions(device=device, timeout=1)
    with capturing(client, "eth1") as capture:
        strangers.mesh.wait_until(
            lambda: client.run(apps.request, there, _MARKER, options).data == _MARKER,
            "connection by the new device",
        )
    assert [str(one) for one in capture.packets if _MARKER in one.payload] == []
    assert [str(one) for one in capture.packets if 8080 in one.ports] == []


def test_a_kernel_without_bpf_gets_nftables(bed: Bed, tmp_path: Path, family: str) -> None:
    """Where bpf(2) fails, `auto` is nftables, and the same traffic is tunnelled."""
    client, server = bed.pod("client"), bed.pod("server")
    with Mesh(bed, tmp_path, without_bpf=True) as mesh:
        for pod in (client, server):
            mesh.enroll(pod)
        echo = server.spawn(apps.echo_server, 8080)
        assert echo.receive() == "listening"
        with capturing(client) as capture:
            there = SocketAddress(server.address(family), 8080)
            assert client.run(apps.request, there, _MARKER).data == _MARKER
        assert_all_tunnelled(capture, client, server, _MARKER)
        assert kernel_state(client)["client"]["programs"] == {}
        assert "redirect to :15001" in client.command("nft", "list", "table", "ip", "pyambient")
