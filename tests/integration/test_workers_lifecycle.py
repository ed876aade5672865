"""`--workers 2` from start to end: what drains, what is left, what goes without a tunnel."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

from pyambient.model.address import SocketAddress
from tests.bed import Bed, BedPod, Mesh, apps, capturing, changes, kernel_state
from tests.cli.test_up import is_gone

from .conftest import _NAMES, Pair, between
from .test_workers import _MANY, _TWO, workers

# What they do takes part of the seconds that a drain may take.
_FEW = 8


def test_a_pod_is_left_as_it_was(bed: Bed, tmp_path: Path, backend: str) -> None:
    """Its connections are drained in both workers, and nothing of either stays."""
    with Mesh(bed, tmp_path, options=_TWO) as mesh:
        strangers = Pair(bed, mesh, backend, *(bed.pod(name) for name in _NAMES))
        pods = (strangers.client, strangers.server)
        before = kernel_state(*pods)
        strangers.enroll()
        there = SocketAddress(strangers.server.ipv4 or "", 8080)
        with (
            strangers.serve(strangers.server, 8080),
            strangers.client.spawn(apps.hold, there, _MANY) as held,
        ):
            assert held.receive() == {}
            freeing = mesh.start_unenrolling(strangers.client)
            mesh.wait_until(lambda: _state(mesh, strangers.client) == "draining", "drain")
            assert held.ask("ping") == {}
            held.send("stop")
            held.wait()
            assert freeing.wait(timeout=20) == 0
        mesh.unenroll(strangers.server)
        assert changes(before, kernel_state(*pods)) == []


def _state(mesh: Mesh, pod: BedPod) -> str:
    (found,) = (one for one in mesh.status()["pods"] if one["name"] == pod.name)
    return str(found["state"])


def test_stopped_they_drain(bed: Bed, tmp_path: Path, backend: str) -> None:
    """`up` waits for both; what a connection had sent by then arrives."""
    with Mesh(bed, tmp_path, options=_TWO) as mesh:
        pods = Pair(bed, mesh, backend, *(bed.pod(name) for name in _NAMES))
        pods.enroll()
        there = SocketAddress(pods.server.ipv4 or "", 8080)
        with (
            pods.serve(pods.server, 8080),
            pods.client.spawn(_say_more_when_told, there, _FEW) as client,
        ):
            assert client.receive() == "connected"
            pids = [worker["pid"] for worker in workers(mesh, pods.client)]
            assert mesh.process is not None
            mesh.process.send_signal(signal.SIGTERM)
            mesh.wait_until(lambda: _drains(mesh) == {0, 1}, "drain in both")
            assert client.ask("go on") == _FEW
            assert mesh.stop() == 0
        while not all(map(is_gone, pids)):
            os.sched_yield()


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


def test_joined_without_a_tunnel_in_either(bed: Bed, tmp_path: Path, backend: str) -> None:
    """`--same-node direct`: each worker knows both pods."""
    options = (*_TWO, "--same-node=direct")
    with Mesh(bed, tmp_path, options=options) as mesh:
        pods = Pair(bed, mesh, backend, *(bed.pod(name) for name in _NAMES))
        pods.enroll()
        there = SocketAddress(pods.server.ipv4 or "", 8080)
        with (
            pods.serve(pods.server, 8080),
            capturing(pods.client) as capture,
            pods.client.spawn(apps.hold, there, _MANY) as held,
        ):
            assert held.receive() == {}
            shares = [worker["connections"] for worker in workers(mesh, pods.client)]
            assert sum(shares) == _MANY
            assert min(shares) > _MANY / 10
        assert between(capture.packets, pods.client, pods.server) == []
