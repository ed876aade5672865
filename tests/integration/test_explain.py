"""What `explain` says of a connection is what happens to it, with every backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from pyambient.model.address import SocketAddress
from tests.bed import BedPod, Capture, Child, ClientOptions, apps, capturing

from .conftest import Pair
from .test_policy import load

_EMPTY_VIP = "10.96.0.2"
_EXCLUDED, _FORBIDDEN = 8082, 8083
_PATIENCE = ClientOptions(timeout=8)
_MESH = f"""
services:
- {{name: no, namespace: default, hostname: no.example, vips: [/{_EMPTY_VIP}], ports: {{80: 80}}}}
policies:
- name: not-here
  namespace: default
  scope: Namespace
  action: Deny
  rules:
  - - - destinationPorts: [{_FORBIDDEN}]
"""


@pytest.fixture(scope="module", autouse=True)
def choices(pair: Pair) -> None:
    """A service without endpoints, a port that policies forbid, one that is not captured."""
    load(pair, _MESH)
    pair.mesh.cli("set", pair.client.name, f"--exclude-outbound-ports={_EXCLUDED}")
    pair.mesh.cli("set", pair.server.name, f"--exclude-inbound-ports={_EXCLUDED}")


@pytest.fixture(scope="module", autouse=True)
def servers(pair: Pair, choices: None) -> Iterator[None]:
    """Something that answers at each place that can be reached."""
    served: list[Child] = []
    try:
        for pod in (pair.client, pair.server, pair.outside):
            served += [pair.serve(pod, port) for port in (8080, _EXCLUDED, _FORBIDDEN)]
        yield
    finally:
        for child in served:
            child.kill()


def explained(pair: Pair, pod: BedPod, to: SocketAddress, *more: str) -> dict[str, Any]:
    said = pair.mesh.cli("explain", pod.name, str(to), "--output=json", *more).stdout
    return dict(json.loads(said))


def outcome(pair: Pair, pod: BedPod, to: SocketAddress, *more: str) -> str:
    return str(explained(pair, pod, to, *more)["outcome"])


def happened(pair: Pair, pod: BedPod, to: SocketAddress) -> str:
    """How a connection made now ends up, told by the answer, the wire and the access log."""
    with capturing(pair.client) as wire:
        seen = pod.run(apps.request, to, b"hello", _PATIENCE)
        captured = _logged(pair, seen.local)
    if seen.data != b"hello":
        return "refused"
    if not captured:
        return "direct"
    return "plain" if _plainly(wire, to) else "tunnelled"


def _plainly(wire: Capture, to: SocketAddress) -> bool:
    return any(to.port in packet.ports for packet in wire.packets)


def _logged(pair: Pair, client: SocketAddress) -> bool:
    """Whether the proxy had the connection: it has its line once it ended."""
    wanted = {"scope": "access", "direction": "outbound", "src.addr": str(client)}
    try:
        pair.mesh.access_log(wanted, timeout=1.5)
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    ("where", "port", "expected"),
    [
        ("server", 8080, "tunnelled"),
        ("server", _EXCLUDED, "direct"),
        ("outside", 8080, "plain"),
        ("outside", _EXCLUDED, "direct"),
        ("client", 8080, "direct"),
    ],
)
def test_the_outcome_of_what_goes_out(
    pair: Pair, family: str, where: str, port: int, expected: str
) -> None:
    """Tunnelled, plain or past the proxy: as it is said, so it is."""
    to = SocketAddress(getattr(pair, where).address(family), port)
    assert outcome(pair, pair.client, to) == expected
    assert happened(pair, pair.client, to) == expected


def test_the_outcome_on_loopback(pair: Pair, family: str) -> None:
    """It is the pod's own business."""
    to = SocketAddress("127.0.0.1" if family == "v4" else "::1", 8080)
    assert outcome(pair, pair.client, to) == "direct"
    assert happened(pair, pair.client, to) == "direct"


def test_a_service_without_endpoints_is_refused(pair: Pair) -> None:
    """By the proxy, with the reason that its access log has."""
    to = SocketAddress(_EMPTY_VIP, 80)
    said = explained(pair, pair.client, to)
    assert said["outcome"] == "refused"
    assert pair.client.run(apps.request, to, b"hello", _PATIENCE).data == b""
    pair.mesh.access_log({"direction": "outbound", "dst.addr": str(to), "error": said["summary"]})


@pytest.mark.parametrize(
    ("port", "expected"), [(8080, "accepted"), (_FORBIDDEN, "refused"), (_EXCLUDED, "direct")]
)
def test_the_outcome_of_what_comes_in(pair: Pair, family: str, port: int, expected: str) -> None:
    """From outside of the mesh in plain TCP, and by a tunnel with its identity."""
    to = SocketAddress(pair.server.address(family), port)
    for client in (pair.outside, pair.client):
        said = explained(pair, pair.server, to, f"--inbound={client.address(family)}")
        assert said["outcome"] == expected
        answered = client.run(apps.request, to, b"hello", _PATIENCE).data == b"hello"
        assert answered is (expected != "refused")
        if expected == "direct":
            continue
        rules = {finding["rule"]: finding for finding in said["findings"]}
        assert rules["client"]["matched"] is (client is pair.client)
        forbids = rules["Deny policy default/not-here"]
        assert forbids["matched"] is (port == _FORBIDDEN)


def test_the_text_is_a_line_for_each_rule(pair: Pair, family: str) -> None:
    """Numbered, with the outcome last; the same that -o json says."""
    to = SocketAddress(pair.server.address(family), 8080)
    lines = pair.mesh.cli("explain", "client", str(to)).stdout.splitlines()
    said = explained(pair, pair.client, to)
    assert lines[-1] == f"tunnelled: {said['summary']}"
    assert [line.split(".")[0].strip() for line in lines[:-1]] == [
        str(number) for number in range(1, len(said["findings"]) + 1)
    ]
    assert any("spiffe://cluster.local/ns/default/sa/server" in line for line in lines)


def test_port_80_is_assumed(pair: Pair) -> None:
    """Of an address of either family without a port."""
    for ip in (pair.server.address("v4"), pair.server.address("v6")):
        said = json.loads(pair.mesh.cli("explain", "client", ip, "-o", "json").stdout)
        assert f"CONNECT {SocketAddress(ip, 80)}" in said["summary"]


@pytest.mark.parametrize("text", ["nowhere", "10.0.0.1:0", "10.0.0.1:99999", "[fd77::3", "", ":80"])
def test_what_is_no_address_is_a_usage_error(pair: Pair, text: str) -> None:
    """In one line."""
    said = pair.mesh.cli("explain", "client", "--", text, code=2).stderr
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
