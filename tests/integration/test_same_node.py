"""`--same-node direct`: pods of one node are joined without a tunnel, and judged all the same."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Iterator

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import Bed, CgroupTree, Child, ClientOptions, Mesh, apps, capturing
from tests.bed.privileges import Capability

from .conftest import Pair, between
from .test_capture import (  # noqa: F401 - these hold with and without a tunnel
    test_a_half_close_stays_one,
    test_a_thousand_connections_are_held,
    test_each_port_reaches_its_own_app,
    test_names_are_true,
    test_the_clients_reset_stays_one,
    test_the_servers_half_close_stays_one,
    test_the_servers_reset_stays_one,
)
from .test_policy import SERVICE, load, write_policy

_MARKER = b"plaintext that must not be on the wire"
_PATIENCE = ClientOptions(timeout=8)
_DIRECT = ("--same-node=direct",)
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_SERVICE = "server.default.svc.cluster.local"
_IDENTITY = "spiffe://cluster.local/ns/default/sa/"


@pytest.fixture(scope="module")
def pair(
    cgroup_tree: CgroupTree, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Three enrolled pods; the third one is `outside` of what policies allow, not of the mesh."""
    directory = tmp_path_factory.mktemp(backend)
    with Bed(cgroup_tree) as bed, Mesh(bed, directory, options=_DIRECT) as mesh:
        pods = [bed.pod(name) for name in ("client", "server", "third")]
        made = Pair(bed, mesh, backend, *pods)
        for pod in pods:
            mesh.enroll(pod, backend=backend)
        yield made


@pytest.fixture
def unruled(pair: Pair) -> Iterator[None]:
    """The mesh file of the test is replaced by an empty one."""
    yield
    load(pair, "# over\nworkloads: []\n")


def test_nothing_is_on_the_wire_and_both_pods_log_it(
    pair: Pair, echo: Child, destination: SocketAddress
) -> None:
    """Not even TLS; each line has both identities, and what its own app sent and received."""
    with capturing(pair.client) as sent, capturing(pair.server) as received:
        seen = pair.client.run(apps.request, destination, _MARKER)
    assert (seen.data, seen.errno) == (_MARKER, None)
    for capture in (sent, received):
        found = [str(packet) for packet in between(capture.packets, pair.client, pair.server)]
        assert found == []
    both = {
        "src.addr": str(seen.local),
        "src.workload": "client",
        "src.identity": f"{_IDENTITY}client",
        "dst.addr": str(destination),
        "dst.workload": "server",
        "dst.identity": f"{_IDENTITY}server",
        "bytes_sent": len(_MARKER),
        "bytes_recv": len(_MARKER),
    }
    for direction in ("outbound", "inbound"):
        (line,) = pair.mesh.access_log(both | {"direction": direction})
        assert "error" not in line
        assert "dst.hbone_addr" not in line


def test_bulk_is_whole_and_counted_at_both_ends(
    pair: Pair, echo: Child, destination: SocketAddress
) -> None:
    """What goes by a pipe of the proxy, too."""
    payload = os.urandom(8 << 20)
    seen = pair.client.run(apps.request, destination, payload)
    assert seen.data == payload
    moved = {"bytes_sent": len(payload), "bytes_recv": len(payload)}
    for direction in ("outbound", "inbound"):
        wanted = {"src.addr": str(seen.local), "direction": direction}
        (line,) = pair.mesh.access_log(wanted | moved)
        assert "error" not in line


def test_explain_says_that_there_is_no_tunnel(pair: Pair, destination: SocketAddress) -> None:
    said = pair.mesh.cli("explain", pair.client.name, str(destination), "--output=json").stdout
    explained = json.loads(said)
    assert explained["outcome"] == "same-node"
    assert "default/server" in explained["summary"]


def test_a_policy_lets_one_identity_in(
    pair: Pair, unruled: None, echo: Child, destination: SocketAddress, family: str
) -> None:
    """The third pod's app gets a reset, the server's nothing, and both logs say why."""
    write_policy(pair, "client")
    assert pair.client.run(apps.request, destination, b"hi", _PATIENCE).data == b"hi"
    refused = pair.outside.run(apps.request, destination, b"hi", _PATIENCE)
    assert (refused.data, refused.errno) == (b"", errno.ECONNRESET)
    assert len(echo.ask("accepted")) == 1
    why = "connection closed due to policy rejection: allow policies exist, but none allowed"
    denied = {"dst.addr": str(destination), "error": why}
    (outbound,) = pair.mesh.access_log(denied | {"direction": "outbound"})
    assert outbound["src.workload"] == "third"
    (inbound,) = pair.mesh.access_log(denied | {"direction": "inbound"})
    assert inbound["src.addr"] == outbound["src.addr"]


def _from(source: str, destination: SocketAddress) -> bytes:
    """What a client hears that takes an address which is not its pod's."""
    with socket.socket(destination.family) as client:
        client.settimeout(2)
        if destination.is_ipv6:
            client.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        else:
            client.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
        client.bind((source, 0))
        try:
            client.connect(destination)
            client.sendall(b"let me in")
            return client.recv(99)
        except OSError:
            return b""


def test_a_forged_source_is_no_identity(
    pair: Pair, unruled: None, echo: Child, destination: SocketAddress, family: str
) -> None:
    """The third pod's app takes the address of the client, whom the policy lets in."""
    write_policy(pair, "client")
    source = pair.client.address(family)
    can = (Capability.NET_ADMIN, Capability.NET_RAW)
    assert pair.outside.run(_from, source, destination, capabilities=can) == b""
    assert pair.client.run(apps.request, destination, b"hi", _PATIENCE).data == b"hi"
    assert len(echo.ask("accepted")) == 1


def test_an_address_that_an_app_adds_is_no_identity(
    pair: Pair, unruled: None, echo: Child, destination: SocketAddress, family: str
) -> None:
    """Nor is one that the third pod really has, before the agent has seen that and after."""
    write_policy(pair, "client")
    options = ClientOptions(timeout=2)
    source = pair.client.address(family)
    length = 32 if family == "v4" else 128
    pair.outside.ip(f"address add {source}/{length} dev lo")
    try:
        as_client = dataclasses.replace(options, source=source)
        assert pair.outside.run(apps.request, destination, b"hi", as_client).data == b""
        pair.mesh.wait_until(lambda: source in _addresses(pair), "address in the status")
        for chosen in (as_client, options):
            assert pair.outside.run(apps.request, destination, b"hi", chosen).data == b""
        assert echo.ask("accepted") == []
    finally:
        pair.outside.ip(f"address del {source}/{length} dev lo")
        pair.mesh.wait_until(lambda: source not in _addresses(pair), "end of the address")


def _addresses(pair: Pair) -> list[str]:
    """Those of the third pod, as the agent knows them."""
    (third,) = (pod for pod in pair.mesh.status()["pods"] if pod["name"] == pair.outside.name)
    return list(third["addresses"])


def test_a_policy_change_ends_what_it_would_not_let_in(
    pair: Pair, unruled: None, echo: Child, destination: SocketAddress
) -> None:
    """The client's connection is closed at both ends; the third pod's, now allowed, goes on."""
    with (
        pair.client.spawn(apps.hold, destination, 1) as denied,
        pair.outside.spawn(apps.hold, destination, 1) as allowed,
    ):
        assert (denied.receive(), allowed.receive()) == ({}, {})
        write_policy(pair, "third")
        closed = {"dst.addr": str(destination), "error": "connection closed due to policy change"}
        for direction in ("inbound", "outbound"):
            lines = pair.mesh.access_log(closed | {"direction": direction})
            assert {line["src.workload"] for line in lines} == {"client"}
        assert denied.ask("ping") != {}
        assert allowed.ask("ping") == {}


IMPOSTOR = """
workloads:
- uid: server
  name: server
  namespace: default
  serviceAccount: impostor
  workloadIps: ["{v4}", "{v6}"]
  protocol: HBONE
  services: {{}}
"""


def test_a_pod_with_another_identity_gets_no_connection(
    pair: Pair, unruled: None, echo: Child, destination: SocketAddress
) -> None:
    """The mesh expects somebody else at the pod's address."""
    load(pair, IMPOSTOR.format(v4=pair.server.ipv4, v6=pair.server.ipv6))
    seen = pair.client.run(apps.request, destination, b"secret", _PATIENCE)
    assert (seen.data, seen.errno) == (b"", errno.ECONNRESET)
    assert echo.ask("accepted") == []
    expected = f"the server is {_IDENTITY}server, expected {_IDENTITY}impostor"
    refused = {"dst.addr": str(destination), "error": f"identity error: {expected}"}
    (line,) = pair.mesh.access_log(refused)
    assert line["direction"] == "outbound"


def test_a_port_without_an_app_is_refused(pair: Pair, family: str) -> None:
    there = SocketAddress(pair.server.address(family), 9)
    seen = pair.client.run(apps.request, there, b"hi", _PATIENCE)
    assert (seen.data, seen.errno) == (b"", errno.ECONNRESET)
    refused = {"dst.addr": str(there), "error": "connection failed: Connection refused"}
    for direction in ("inbound", "outbound"):
        (line,) = pair.mesh.access_log(refused | {"direction": direction})
        assert line["dst.workload"] == "server"


@pytest.mark.parametrize("name", ["client", "server"])
def test_a_service_leads_to_a_pod_of_the_node(
    pair: Pair, unruled: None, echo: Child, family: str, name: str
) -> None:
    """The server's own app may be the one that asks."""
    load(pair, SERVICE.format(v4=pair.server.ipv4, v6=pair.server.ipv6, port=8080))
    vip = SocketAddress("10.96.0.10" if family == "v4" else "fd96::10", 80)
    source = {pod.name: pod for pod in (pair.client, pair.server)}[name]
    seen = source.run(apps.request, vip, b"by service", _PATIENCE)
    assert (seen.data, seen.peer) == (b"by service", vip)
    for direction in ("inbound", "outbound"):
        wanted = {"src.addr": str(seen.local), "direction": direction, "dst.service": _SERVICE}
        (line,) = pair.mesh.access_log(wanted)
        assert line["dst.identity"] == f"{_IDENTITY}server"


def test_it_ends_with_the_enrolment_of_either_pod(pair: Pair, family: str) -> None:
    """Un-enrolled without patience, a pod's connections are closed; others' are not."""
    there = SocketAddress(pair.server.address(family), 8095)
    elsewhere = SocketAddress(pair.outside.address(family), 8095)
    with (
        pair.serve(pair.server, 8095),
        pair.serve(pair.outside, 8095),
        pair.client.spawn(apps.hold, there, 2) as to_server,
        pair.client.spawn(apps.hold, elsewhere, 2) as to_third,
    ):
        assert (to_server.receive(), to_third.receive()) == ({}, {})
        try:
            pair.mesh.cli("unenroll", pair.server.name, "--drain-timeout=0")
            drained = {"dst.addr": str(there), "error": "connection closed due to connection drain"}
            assert len(pair.mesh.access_log(drained, 4)) == 4
            assert set(to_server.ask("ping")) == {0, 1}
            assert to_third.ask("ping") == {}
        finally:
            pair.mesh.enroll(pair.server, backend=pair.backend)
    with pair.serve(pair.server, 8095), capturing(pair.client) as wire:
        assert pair.client.run(apps.request, there, _MARKER, _PATIENCE).data == _MARKER
    assert between(wire.packets, pair.client, pair.server) == []
