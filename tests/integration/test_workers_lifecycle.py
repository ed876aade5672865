"""`--workers 2` from start to end: what drains, what is left, what goes without a tunnel."""

from __future__ import annotations

import signal
import socket
from typing import Any

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import BedPod, Mesh, apps, capturing, changes, is_gone, kernel_state

from .conftest import Pair, between
from .test_workers import _MANY, _TWO, workers

# What they do takes part of the seconds that a drain may take.
_FEW = 8


@pytest.fixture(scope="module")
def mesh_settings() -> dict[str, Any]:
    """Two workers."""
    return {"options": _TWO}


def test_a_pod_is_left_as_it_was(strangers: Pair) -> None:
    """Its connections are drained in both workers, and nothing of either stays."""
    mesh, client, server = strangers.mesh, strangers.client, strangers.server
    before = kernel_state(client, server)
    strangers.enroll()
    there = SocketAddress(server.ipv4 or "", 8080)
    with strangers.serve(server, 8080), client.spawn(apps.hold, there, _MANY) as held:
        assert held.receive() == {}
        freeing = mesh.start_unenrolling(client)
        mesh.wait_until(lambda: _state(mesh, client) == "draining", "drain")
        assert held.ask("ping") == {}
        held.send("stop")
        held.wait()
        assert freeing.wait(timeout=20) == 0
    mesh.unenroll(server)
    assert changes(before, kernel_state(client, server)) == []


def _state(mesh: Mesh, pod: BedPod) -> str:
    (found,) = (one for one in mesh.status()["pods"] if one["name"] == pod.name)
    return str(found["state"])


def test_stopped_they_drain(strangers: Pair) -> None:
    """`up` waits for both; what a connection had sent by then arrives."""
    mesh, client = strangers.mesh, strangers.client
    strangers.enroll()
    there = SocketAddress(strangers.server.ipv4 or "", 8080)
    with (
        strangers.serve(strangers.server, 8080),
        client.spawn(_say_more_when_told, there, _FEW) as talking,
    ):
        assert talking.receive() == "connected"
        pids = [worker["pid"] for worker in workers(mesh, client)]
        assert mesh.process is not None
        mesh.process.send_signal(signal.SIGTERM)
        mesh.wait_until(lambda: _drains(mesh) == {0, 1}, "drain in both")
        assert talking.ask("go on") == _FEW
        assert mesh.stop() == 0
    assert all(map(is_gone, pids))


def _drains(mesh: Mesh) -> set[int]:
    return {one["worker"] for one in mesh.lines() if one.get("message") == "draining"}


def _say_more_when_told(channel: Any, there: SocketAddress, count: int) -> None:
    """Hold connections; then exchange a byte on each and close it. How many did."""
    held = [socket.create_connection((there.ip, there.port), timeout=10) for _ in range(count)]
    for one in held:
        one.sendall(b"x")
        assert one.recv(1) == b"x"
    channel.send("connected")
    channel.receive()
    done = 0
    for one in held:
        with one:
            one.sendall(b"y")
            done += one.recv(1) == b"y"
    channel.send(done)


@pytest.mark.parametrize(
    "mesh_settings", [{"options": (*_TWO, "--same-node=direct")}], ids=["direct"], scope="module"
)
def test_joined_without_a_tunnel_in_either(strangers: Pair) -> None:
    """`--same-node direct`: each worker knows both pods."""
    client, server = strangers.client, strangers.server
    strangers.enroll()
    there = SocketAddress(server.ipv4 or "", 8080)
    with (
        strangers.serve(server, 8080),
        capturing(client) as capture,
        client.spawn(apps.hold, there, _MANY) as held,
    ):
        assert held.receive() == {}
        shares = [worker["connections"] for worker in workers(strangers.mesh, client)]
        assert sum(shares) == _MANY
        assert min(shares) > _MANY / 10
    assert between(capture.packets, client, server) == []
