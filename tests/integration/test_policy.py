"""Policies, services and identities of the mesh file, at work between enrolled pods."""

from __future__ import annotations

import errno
import itertools
import time
from collections.abc import Iterator

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT
from tests.bed import BedPod, ClientOptions, apps
from tests.bed.masquerade import masqueraded

from . import attacker
from .conftest import Pair

_ports = itertools.count(8100)
SETTLE = ClientOptions(timeout=8)

POLICY = """
policies:
- name: only-the-client
  namespace: default
  scope: Namespace
  action: Allow
  dryRun: false
  rules:
  - - - principals:
        - !Exact cluster.local/ns/default/sa/{allowed}
"""


def load(pair: Pair, text: str) -> None:
    """Replace the mesh file and wait until the proxy has taken it."""

    def loads() -> int:
        return sum("was loaded again" in str(line.get("message")) for line in pair.mesh.lines())

    before = loads()
    pair.mesh.write_mesh(text)
    pair.mesh.wait_until(lambda: loads() > before, "reload of the mesh file")


@pytest.fixture
def port() -> int:
    """A port of the test's own, by which its lines are found in the shared log."""
    return next(_ports)


@pytest.fixture(scope="module")
def behind_the_node(pair: Pair) -> Iterator[BedPod]:
    """A pod whose connections come from the node's own address."""
    with masqueraded(pair.bed) as pod:
        yield pod


@pytest.fixture(autouse=True)
def no_leftover(pair: Pair) -> Iterator[None]:
    """Each test ends with an empty mesh file."""
    yield
    load(pair, f"# {time.monotonic()}\nworkloads: []\n")


def write_policy(pair: Pair, allowed: str) -> None:
    load(pair, POLICY.format(allowed=allowed))


def test_a_policy_lets_one_identity_in_and_no_plaintext(pair: Pair, family: str, port: int) -> None:
    """The allowed pod is answered; the other identity and the pod outside the mesh are not."""
    write_policy(pair, "client")
    there = SocketAddress(pair.server.address(family), port)
    with pair.serve(pair.server, port) as echo:
        assert pair.client.run(apps.request, there, b"hi", SETTLE).data == b"hi"
        refused = pair.outside.run(apps.request, there, b"hi", SETTLE)
        assert (refused.data, refused.errno) == (b"", errno.ECONNRESET)
        assert len(echo.ask("accepted")) == 1
    (line,) = pair.mesh.access_log({"direction": "inbound", "dst.addr": str(there)})
    assert "policy rejection" in line["error"]


def test_a_probe_of_the_node_passes_what_no_plaintext_does(
    pair: Pair, behind_the_node: BedPod, family: str, port: int
) -> None:
    """The node's own socket reaches the app; what the node masquerades, from its address, not."""
    write_policy(pair, "client")
    there = SocketAddress(pair.server.address(family), port)
    with pair.serve(pair.server, port) as echo:
        assert pair.bed.node.run(apps.request, there, b"alive?", SETTLE).data == b"alive?"
        refused = behind_the_node.run(apps.request, there, b"alive?", SETTLE)
        assert (refused.data, refused.errno) == (b"", errno.ECONNRESET)
        assert len(echo.ask("accepted")) == 1


def test_a_denied_identity_gets_401_and_its_app_a_reset(pair: Pair, family: str, port: int) -> None:
    write_policy(pair, "nobody-here")
    there = SocketAddress(pair.server.address(family), port)
    with pair.serve(pair.server, port) as echo:
        refused = pair.client.run(apps.request, there, b"hi", SETTLE)
        assert (refused.data, refused.errno) == (b"", errno.ECONNRESET)
        assert echo.ask("accepted") == []
    out = {"direction": "outbound", "dst.hbone_addr": str(there)}
    assert pair.mesh.access_log(out)[0]["error"] == "http status: 401"
    hbone = str(SocketAddress(pair.server.address(family), HBONE_PORT))
    inbound = pair.mesh.access_log({"direction": "inbound", "dst.addr": hbone})
    assert any("policy rejection" in str(line.get("error")) for line in inbound)


def test_a_policy_change_ends_what_it_would_not_let_in(pair: Pair, family: str, port: int) -> None:
    """A live connection whose identity is denied now is closed, as ztunnel does."""
    there = SocketAddress(pair.server.address(family), port)
    with pair.serve(pair.server, port):
        holder = pair.client.spawn(apps.hold, there, 1)
        assert holder.receive() == {}
        write_policy(pair, "nobody-here")
        hbone = {"direction": "inbound", "error": "connection closed due to policy change"}
        pair.mesh.access_log(hbone)
        assert holder.ask("ping") != {}
        holder.send("stop")


SERVICE = """
workloads:
- uid: server
  name: server
  namespace: default
  serviceAccount: server
  workloadIps: ["{v4}", "{v6}"]
  protocol: HBONE
  services:
    "default/server.default.svc.cluster.local":
      80: {port}
services:
- name: server
  namespace: default
  hostname: server.default.svc.cluster.local
  vips: ["/10.96.0.10", "/fd96::10"]
  ports:
    80: {port}
"""


def test_a_service_vip_reaches_its_endpoint_through_the_mesh(
    pair: Pair, family: str, port: int
) -> None:
    """The app dials VIP:80, the tunnel asks for the pod's port, and the app still sees the VIP."""
    load(pair, SERVICE.format(v4=pair.server.ipv4, v6=pair.server.ipv6, port=port))
    vip = SocketAddress("10.96.0.10" if family == "v4" else "fd96::10", 80)
    with pair.serve(pair.server, port):
        seen = pair.client.run(apps.request, vip, b"by service", SETTLE)
    assert (seen.data, seen.peer) == (b"by service", vip)
    endpoint = str(SocketAddress(pair.server.address(family), port))
    (line,) = pair.mesh.access_log({"direction": "outbound", "dst.hbone_addr": endpoint})
    assert line["dst.service"] == "server.default.svc.cluster.local"


IMPOSTOR = """
workloads:
- uid: outside
  name: outside
  namespace: default
  serviceAccount: outside
  workloadIps: ["{v4}", "{v6}"]
  protocol: HBONE
  services: {{}}
"""


def test_a_server_with_another_identity_gets_no_connect(pair: Pair, family: str, port: int) -> None:
    """Its certificate is of our CA, but not of the workload we meant: closed before CONNECT."""
    outside = pair.outside
    load(pair, IMPOSTOR.format(v4=outside.ipv4, v6=outside.ipv6))
    credentials = attacker.issue(pair.mesh.ca_dir, "spiffe://cluster.local/ns/default/sa/impostor")
    child = outside.spawn(attacker.impostor, HBONE_PORT, credentials)
    assert child.receive() == "listening"
    there = SocketAddress(outside.address(family), port)
    seen = pair.client.run(apps.request, there, b"secret", SETTLE)
    assert (seen.data, seen.errno) == (b"", errno.ECONNRESET)
    assert child.receive() == b""
    child.kill()
    (line,) = pair.mesh.access_log({"direction": "outbound", "dst.hbone_addr": str(there)})
    assert "impostor, expected" in line["error"]
