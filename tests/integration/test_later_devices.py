"""Devices that come to a pod while it lives: it sends by each at once, as fast as it can.

The agent learns of a device from the kernel, like everybody, and acts a moment later. No packet of
an app leaves in between.
"""

from __future__ import annotations

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import RESOLVER_PORT
from tests.bed import Bed, Network, apps, capturing
from tests.bed.apps import ClientOptions
from tests.bed.network import ip

from .conftest import Pair
from .guard import guard_of, log_lines

pytestmark = pytest.mark.parametrize("backend", ["bpf", "tc"], scope="module")

_ROUNDS = 10
_PORT = 8080
# The apps' own: a proxy's sockets get theirs from the kernel, from 32768 on.
_SOURCE_PORTS = range(9000, 9000 + _ROUNDS)
_NETWORK = "br78", "10.78.0", "fd78::"


def _configure_and_send(device: str, addresses: list[str], to: SocketAddress, port: int) -> None:
    """As root in the pod: up, addressed and used, with nothing in between."""
    ip(f"link set {device} up", *(f"addr add {a} dev {device} nodad" for a in addresses))
    for bound in (None, device):
        apps.send_syn(to, port, bound)
        apps.send_datagram(SocketAddress(to.ip, RESOLVER_PORT), port, b"a question", bound)


def test_nothing_leaves_in_the_moment_before(bed: Bed, strangers: Pair, family: str) -> None:
    """Device after device; the last one is captured in the end, and what was lost is counted."""
    client, mesh = strangers.client, strangers.mesh
    peer = bed.pod("peer", network=bed.add_network(Network(*_NETWORK, node_is_router=False)))
    strangers.enroll()
    to = SocketAddress(peer.address(family), _PORT)
    with strangers.serve(peer, _PORT), capturing(peer) as capture:
        for port in _SOURCE_PORTS:
            device = f"later{port}"
            ip(
                f"link add up{port} type veth peer name {device} netns {client.name}",
                f"link set up{port} master br78 up",
            )
            client.veths[device] = f"up{port}"
            addresses = ["10.78.0.99/24"] if family == "v4" else ["fd78::99/64"]
            client.run(_configure_and_send, device, addresses, to, port, uid=0, gid=0)
            if port != _SOURCE_PORTS[-1]:
                ip(f"link del up{port}")
        mesh.wait_until(lambda: not client.run(_refused, to), "answer by the last device")
    assert [str(p) for p in capture.packets if p.source.port in _SOURCE_PORTS and p.speaks] == []
    if strangers.backend == "tc":
        assert guard_of(mesh, client)["dropped"]["unguarded"] >= _ROUNDS
        mesh.wait_until(lambda: log_lines(mesh, client, "guard"), "line of the guard")


def _refused(to: SocketAddress) -> bool:
    return apps.request(to, options=ClientOptions(timeout=2)).failed
