"""The mesh files we show do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests
from pyambient.mesh.inbound import Accept, Entrance, Reject, decide_inbound, decide_plaintext
from pyambient.mesh.localfile import read
from pyambient.mesh.route import Tunnel, decide_outbound
from pyambient.mesh.view import MeshView
from pyambient.model.address import SocketAddress
from pyambient.model.spiffe import SpiffeId

EXAMPLES = Path(tests.__file__).parent.parent / "examples"
CLIENT = SpiffeId("cluster.local", "demo", "client")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_loads(path):
    """Every mesh file among the examples loads."""
    config, _ = read(path)
    assert config.policies


@pytest.fixture
def view() -> MeshView:
    view = MeshView()
    view.load(EXAMPLES / "mesh.yaml")
    return view


def named(view, name):
    return view.snapshot.workload_by_uid(f"Kubernetes//Pod/demo/{name}")


@pytest.mark.parametrize(
    ("vip", "server"), [("10.96.0.10", "10.10.2.2"), ("fd00:96::10", "fd00:10:2::2")]
)
def test_client_to_service(view, vip, server):
    """The client's connection to the virtual IP becomes a tunnel to the server's port 8080."""
    route = decide_outbound(view.snapshot, named(view, "client"), SocketAddress(vip, 80))
    assert isinstance(route, Tunnel)
    assert route.next_hop == SocketAddress(server, 15008)
    assert route.authority == str(SocketAddress(server, 8080))
    assert route.expected == {named(view, "server").identity}


@pytest.mark.parametrize(
    ("port", "account", "allowed"),
    [(8080, "client", True), (8081, "client", False), (8080, "server", False)],
)
def test_policy(view, port, account, allowed):
    """Just the client, and just to port 8080."""
    own, peer = named(view, "server"), SocketAddress("10.10.1.2", 40000)
    identity = SpiffeId("cluster.local", "demo", account)
    at = Entrance("10.10.2.2")
    decided = decide_inbound(f"{at.ip}:{port}", at, own, view.snapshot, peer, identity)
    assert isinstance(decided, Accept if allowed else Reject)


def test_policy_refuses_plaintext(view):
    """Who proves no identity is refused."""
    own, peer = named(view, "server"), SocketAddress("10.10.1.2", 40000)
    target = SocketAddress("10.10.2.2", 8080)
    decided = decide_plaintext(target, own.addresses, own, view.snapshot, peer)
    assert isinstance(decided, Reject)
    assert decided.status == 401
