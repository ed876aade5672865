"""Attacks on a pod's leak guard with the real proxy: what is dropped, and who is told of it.

What an app with CAP_NET_RAW writes by itself is in tests/intercept/test_bpf_guard_attacks.py.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Mapping
from typing import Any

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import Capability, Channel, apps
from tests.bed.apps import ClientOptions
from tests.bed.forging import Forged, send_tcp
from tests.bed.xdp import xdp_sender

from .conftest import Pair
from .guard import MARKER, guard_of, log_lines, nothing_arrives

pytestmark = pytest.mark.parametrize("backend", ["bpf"], scope="module")

_TCP_REPAIR_WINDOW, _A_WINDOW = 29, struct.pack("=5I", 0, 65535, 65535, 65535, 0)
_TCP_REPAIR, _WITHOUT_A_PROBE = 19, -1
_RAW, _ADMIN = [Capability.NET_RAW], [Capability.NET_ADMIN, Capability.NET_RAW]


def _repaired(there: SocketAddress, mark: int) -> None:
    """A connection that was never opened: TCP_REPAIR declares it to be."""
    with socket.socket(there.family) as client:
        client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        client.connect(there.sockaddr())
        client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_WINDOW, _A_WINDOW)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _WITHOUT_A_PROBE)
        client.sendall(MARKER)
        client.settimeout(0.5)
        with contextlib.suppress(OSError):
            client.recv(100)


@pytest.mark.parametrize("mark", [0x539, 0])
def test_a_repaired_socket(pair: Pair, destination: SocketAddress, mark: int) -> None:
    """Declared connected without a SYN; connect() has judged it all the same."""
    before = guard_of(pair.mesh, pair.client)["dropped"].get("captured", 0)
    with nothing_arrives(pair.server):
        pair.client.run(_repaired, destination, mark, capabilities=_ADMIN)
    assert guard_of(pair.mesh, pair.client)["dropped"]["captured"] > before


def test_a_bound_device(pair: Pair, destination: SocketAddress) -> None:
    """Bound to eth0 before it connects an unprivileged app's socket goes by the proxy."""
    with pair.serve(pair.server, destination.port), nothing_arrives(pair.server):
        seen = pair.client.run(
            apps.request, destination, MARKER, options=ClientOptions(device="eth0")
        )
    assert seen.data == MARKER


def test_drops_are_shown_and_logged(pair: Pair, destination: SocketAddress) -> None:
    """`status` tells reason and ends, the log the pod's name; the other pod is not blamed."""
    source = SocketAddress(pair.client.address("v6" if destination.is_ipv6 else "v4"), 4711)
    segment = Forged(source, destination, payload=MARKER)
    with nothing_arrives(pair.server):
        pair.client.run(send_tcp, segment, capabilities=_RAW)
    guard = guard_of(pair.mesh, pair.client)
    ends = {(drop["reason"], drop["source"], drop["destination"]) for drop in guard["last"]}
    assert ("raw", str(source), str(destination)) in ends
    assert guard_of(pair.mesh, pair.server)["dropped"] == {}
    assert f"{source} > {destination} raw" in pair.mesh.cli("status").stdout

    def logged() -> bool:
        lines = log_lines(pair.mesh, pair.client, "guard")
        return any(str(destination) in line.get("last", "") for line in lines)

    pair.mesh.wait_until(logged, "line of the guard")
    assert log_lines(pair.mesh, pair.server, "guard") == []


def _hold(channel: Channel, kind: str) -> None:
    """An app that could send past the guard, and does not."""
    with contextlib.ExitStack() as stack:
        if kind == "packet socket":
            stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
        else:
            stack.enter_context(xdp_sender("eth0"))
        channel.send("open")
        channel.receive()


@pytest.mark.parametrize("kind", ["packet socket", "AF_XDP socket"])
def test_who_could_pass_the_guard_is_named(pair: Pair, kind: str) -> None:
    """Found in a round, counted, and in the log with the pod's name."""
    with pair.client.spawn(_hold, kind, capabilities=_RAW) as child:
        assert child.receive() == "open"

        def found() -> list[Mapping[str, Any]]:
            lines = log_lines(pair.mesh, pair.client, "guard")
            return [line for line in lines if line.get("by") == kind]

        pair.mesh.wait_until(found, f"line about the {kind}")
        (line,) = found()
        assert guard_of(pair.mesh, pair.client)["bypasses"][kind] == 1
        if kind == "packet socket":
            assert line["process"].startswith(f"{child.pid} (")
        child.send("close")
