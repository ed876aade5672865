"""Another backend for living pods: what goes on (all), and what gets past the mesh (nothing)."""

from __future__ import annotations

import contextlib
import itertools
import socket

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import Bed, Channel, Child, Mesh, apps, capturing
from tests.dns import build

from . import resolver
from .conftest import _NAMES, Pair, assert_all_tunnelled

_MARKER = b"plaintext that must not be on the wire"
_APPS_PORT = 4000  # none that the kernel would choose for the proxy
_PAIRS = (
    *itertools.permutations(("bpf", "nftables", "iptables"), 2),
    *(("tc", "nftables"), ("iptables", "tc")),
    *(("bpf", "tc"), ("tc", "bpf")),
)


@pytest.fixture(params=_PAIRS, ids="-to-".join)
def switching(request: pytest.FixtureRequest, bed: Bed, mesh: Mesh) -> tuple[Pair, str]:
    """Two pods, not enrolled yet: the backend to begin with is the pair's, the other is next."""
    before, after = request.param
    return Pair(bed, mesh, before, *(bed.pod(name) for name in _NAMES)), after


def _switch(pair: Pair, backend: str) -> None:
    for pod in (pair.client, pair.server):
        pair.mesh.cli("enroll", pod.name, f"--backend={backend}")
    assert [pod["backend"] for pod in pair.mesh.status()["pods"]] == [backend] * 2


def _keep_asking(channel: Channel, there: SocketAddress) -> tuple[int, list[str]]:
    """Connect again and again until told to stop: how many answers there were, and what failed."""
    answers, failures = 0, []
    channel.send("started")
    while not channel.poll():
        exchange = apps.request(there, _MARKER)
        answers += exchange.data == _MARKER
        if exchange.failed:
            failures.append(f"{exchange.stage}: {exchange.errno}")
    return answers, failures


def test_connections_survive_a_switch(switching: tuple[Pair, str], family: str) -> None:
    """Those from before the enrolment, in both directions, and those that the proxy relays."""
    pair, after = switching
    client, server = pair.client, pair.server
    there = SocketAddress(server.address(family), 8080)
    back = SocketAddress(client.address(family), 8080)
    with pair.serve(server, 8080), pair.serve(client, 8080):
        held: list[Child] = [client.spawn(apps.hold, there, 3), server.spawn(apps.hold, back, 3)]
        assert [child.receive() for child in held] == [{}, {}]
        pair.enroll()
        held += [client.spawn(apps.hold, there, 3), server.spawn(apps.hold, back, 3)]
        assert [child.receive() for child in held[2:]] == [{}, {}]
        _switch(pair, after)
        assert [child.ask("ping") for child in held] == [{}] * 4
        with capturing(client) as capture:
            assert client.run(apps.request, there, _MARKER).data == _MARKER
        assert_all_tunnelled(capture, client, server, _MARKER)
        assert [child.ask("ping") for child in held] == [{}] * 4


def test_nothing_gets_past_the_mesh_meanwhile(switching: tuple[Pair, str], family: str) -> None:
    """A client that connects all the time never fails, and never speaks in plain text."""
    pair, after = switching
    client, server = pair.client, pair.server
    there = SocketAddress(server.address(family), 8080)
    with pair.serve(server, 8080), capturing(client) as capture:
        pair.enroll()
        asking = client.spawn(_keep_asking, there)
        assert asking.receive() == "started"
        for backend in (after, pair.backend):
            _switch(pair, backend)
        asking.send("stop")
        answers, failures = asking.wait()
    assert failures == []
    assert answers > 0
    assert_all_tunnelled(capture, client, server, _MARKER)


def _keep_querying(channel: Channel, there: SocketAddress) -> int:
    """Ask a resolver again and again from one port until told to stop: how many answers came."""
    answers = 0
    with apps.listener(_APPS_PORT, kind=socket.SOCK_DGRAM) as client:
        client.settimeout(0.1)
        channel.send("started")
        ip = there.ip if there.is_ipv6 else f"::ffff:{there.ip}"
        while not channel.poll():
            with contextlib.suppress(OSError):
                client.sendto(build.query(), (ip, there.port))
                answers += bool(client.recv(512))
    return answers


def test_no_query_gets_past_the_mesh_meanwhile(switching: tuple[Pair, str], family: str) -> None:
    """A resolver outside is asked by the proxy, from ports of its own, and never by the app."""
    pair, after = switching
    there = SocketAddress(pair.outside.address(family), resolver.PORT)
    resolving = pair.outside.spawn(resolver.resolver, uid=0, gid=0)
    assert resolving.receive() == "listening"
    pair.enroll()
    with capturing(pair.client) as capture:
        asking = pair.client.spawn(_keep_querying, there)
        assert asking.receive() == "started"
        for backend in (after, pair.backend):
            _switch(pair, backend)
        asking.send("stop")
        assert asking.wait() > 0
    asked = [packet for packet in capture.packets if packet.destination == there]
    assert asked
    assert [str(packet) for packet in asked if _APPS_PORT in packet.ports] == []


def test_direct_connections_outlive_the_proxy(strangers: Pair, family: str) -> None:
    """From before the enrolment, they need no proxy: killed and started again, it is not missed."""
    client, server = strangers.client, strangers.server
    there = SocketAddress(server.address(family), 8080)
    with strangers.serve(server, 8080), client.spawn(apps.hold, there, 3) as held:
        assert held.receive() == {}
        strangers.enroll()
        strangers.mesh.kill()
        assert held.ask("ping") == {}
        strangers.mesh.start()
        assert held.ask("ping") == {}
