"""Pods whose apps have the proxy's ports: before the enrolment, or while no proxy is there."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import HBONE_PORT, RESERVED_PORTS
from tests.bed import BedPod, Channel, Child, ClientOptions, apps, capturing
from tests.dns import build

from . import resolver
from .conftest import Pair, assert_all_tunnelled
from .test_dns_lifecycle import resolver_of, serve
from .test_policy import load
from .test_service_of_itself import MESH, VIPS

pytestmark = pytest.mark.parametrize("backend", ["bpf", "tc", "nftables", "iptables"])
_MARKER = b"plaintext that must not be on the wire"
_IDENTS = list(range(0x4000, 0x4004))
_QUERIES = [build.query(ident) for ident in _IDENTS]
_ANSWERS = [build.answer_to(query) for query in _QUERIES]
_MOVED = {"outbound": 15101, "inbound": 15106, "hbone": 15108, "dns": 15153}
_FAMILIES = ("v4", "v6")

# How a port is held; each has its turn at each kind of port.
_LISTENING = {15001: "::", 15006: "0.0.0.0", 15008: "::", 15053: "::1"}
_OTHERWISE = {15001: "connection", 15006: "::1", 15008: "connection", 15053: "datagrams"}


def _held(pair: Pair, pod: BedPod, port: int, how: str) -> Child:
    """An app that has the port; its connections go to the pod that is not enrolled."""
    if how == "connection":
        child = pod.spawn(_hold_as_own, port, SocketAddress(pair.outside.ipv6, 8080))
    elif how == "datagrams":
        child = pod.spawn(_receive_datagrams, port)
    else:
        child = pod.spawn(apps.echo_server, port, how)
    assert child.receive() == "listening"
    return child


def _hold_as_own(channel: Channel, port: int, there: SocketAddress) -> None:
    with socket.socket(there.family) as client:
        client.bind(("", port))
        client.connect(there.sockaddr())
        channel.send("listening")
        while channel.receive() == "ping":
            client.sendall(b"ping")
            channel.send(client.recv(100))


def _receive_datagrams(channel: Channel, port: int) -> None:
    with apps.listener(port, "127.0.0.1", socket.SOCK_DGRAM):
        channel.send("listening")
        channel.receive()


def _take(pair: Pair, how: Mapping[int, str]) -> dict[str, dict[int, Child]]:
    """Apps in both pods that have these ports to the end of the test, by the pod's name."""
    pair.serve(pair.outside, 8080)
    return {
        pod.name: {port: _held(pair, pod, port, kind) for port, kind in how.items()}
        for pod in (pair.client, pair.server)
    }


def _ports(pair: Pair) -> list[dict[str, int]]:
    return [pod["ports"] for pod in pair.mesh.status()["pods"]]


def _request_each(*there: SocketAddress) -> list[bytes]:
    return [apps.request(address, _MARKER).data for address in there]


def _at(pod: BedPod, port: int) -> list[SocketAddress]:
    return [SocketAddress(pod.address(family), port) for family in _FAMILIES]


def _ask_each(*resolvers: SocketAddress) -> list[tuple[bytes, SocketAddress]]:
    """Over UDP and over TCP: what each says, and who said it."""
    said = []
    for address in resolvers:
        answers = resolver.ask(address, *_QUERIES)
        said += [(answer.message, answer.sender) for answer in answers]
        said += [(message, address) for message in resolver.ask_over_tcp(address, *_QUERIES)]
    return said


def _assert_it_all_works(pair: Pair) -> None:
    """Tunnels both ways, plain from outside, DNS over UDP and TCP, in both families."""
    pods = (pair.client, pair.server)
    with capturing(pair.client) as capture:
        for one, other in (pods, pods[::-1]):
            with pair.serve(other, 8090) as server:
                assert one.run(_request_each, *_at(other, 8090)) == [_MARKER] * 2
                seen = server.ask("accepted")
            assert [accepted.peer.ip for accepted in seen] == [one.ipv4, one.ipv6]
    assert_all_tunnelled(capture, *pods, _MARKER)
    with pair.serve(pods[0], 8091), pair.serve(pods[1], 8091):
        there = (*_at(pods[0], 8091), *_at(pods[1], 8091))
        assert pair.outside.run(_request_each, *there) == [_MARKER] * 4
    resolvers = [resolver_of(pair, family) for family in _FAMILIES]
    with serve(pair) as server:
        for pod in pods:
            expected = [(answer, one) for one in resolvers for answer in _ANSWERS * 2]
            assert pod.run(_ask_each, *resolvers) == expected
            seen = [one.ident for one in server.ask("seen")]
            assert len(seen) == len(expected)
            assert not any(seen[at : at + 4] == _IDENTS for at in range(0, len(seen), 4))


@pytest.mark.parametrize("how", [_LISTENING, _OTHERWISE], ids=["listening", "otherwise"])
def test_both_pods_are_served_on_other_ports(strangers: Pair, how: dict[int, str]) -> None:
    """Whoever has a port keeps it, and 15008 stays what is on the wire."""
    holders = _take(strangers, how)
    strangers.enroll()
    assert _ports(strangers) == [_MOVED, _MOVED]
    _assert_it_all_works(strangers)
    assert "✘" not in strangers.mesh.cli("verify", "server").stdout
    for pod in (strangers.client, strangers.server):
        for port in (port for port, kind in how.items() if kind == "connection"):
            assert holders[pod.name][port].ask("ping") == b"ping"
        strangers.mesh.unenroll(pod)
    there = SocketAddress(strangers.server.ipv4, 8092)
    with strangers.serve(strangers.server, 8092) as server:
        assert strangers.client.run(apps.request, there).data == b"hello"
        assert server.ask("accepted")[0].peer.ip == strangers.client.ipv4


def test_apps_on_these_ports_are_reached(strangers: Pair, family: str) -> None:
    """By the mesh and by the pod itself; where the proxy listens now is nobody's to reach."""
    own = SocketAddress(strangers.server.address(family), 15001)
    _take(strangers, dict.fromkeys(RESERVED_PORTS, "::"))
    strangers.enroll()
    for port in (15001, 15006, 15053, HBONE_PORT):
        there = SocketAddress(own.ip, port)
        assert strangers.client.run(apps.request, there, _MARKER).data == _MARKER
    assert strangers.outside.run(apps.request, own).data == b"hello"
    for port in RESERVED_PORTS:
        assert strangers.server.run(apps.request, own._replace(port=port)).data == b"hello"
    for port in (15101, 15106, 15108):
        loop = own._replace(port=port)
        for pod in (strangers.client, strangers.outside):
            assert pod.run(apps.request, loop, b"x", ClientOptions(timeout=3)).data == b""
        plain = {"direction": "inbound", "dst.addr": str(loop)}
        (line,) = strangers.mesh.access_log(plain)
        assert line["error"] == "attempted recursive call to ourselves"


def test_a_pod_reaches_itself_by_a_service(strangers: Pair, family: str) -> None:
    """Its tunnel to itself is not on the wire, so nothing redirects it from 15008."""
    server = strangers.server
    strangers.serve(server, HBONE_PORT)
    strangers.enroll()
    load(strangers, MESH.format(ipv4=server.ipv4, ipv6=server.ipv6))
    with strangers.serve(server, 8080):
        vip = SocketAddress(VIPS[family], 8080)
        seen = server.run(apps.request, vip, b"to myself", ClientOptions(timeout=8))
    assert (seen.errno, seen.data) == (None, b"to myself")


def test_a_port_that_is_taken_while_the_proxy_is_away(strangers: Pair) -> None:
    """With `bpf` it cannot be; with the others the next proxy listens elsewhere."""
    strangers.enroll()
    strangers.mesh.kill()
    if strangers.backend == "bpf":
        assert strangers.client.run(_try_to_bind, 15001) == "EPERM"
        strangers.mesh.start()
        taken = []
    else:
        pods = (strangers.client, strangers.server)
        taken = [strangers.serve(pod, port) for pod in pods for port in RESERVED_PORTS]
        strangers.mesh.start()
        strangers.mesh.wait_until(lambda: _ports(strangers) == [_MOVED, _MOVED], "other ports")
    strangers.mesh.wait_until(lambda: _all_served(strangers), "listeners in both pods")
    _assert_it_all_works(strangers)
    for server in taken:
        server.kill()


def _all_served(pair: Pair) -> bool:
    return all(pod["proxy"] for pod in pair.mesh.status()["pods"])


def _try_to_bind(port: int) -> str:
    with socket.socket(socket.AF_INET6) as made:
        try:
            made.bind(("::", port))
        except PermissionError:
            return "EPERM"
    return "bound"


def test_what_explain_and_status_say(strangers: Pair) -> None:
    """The port that is meant, and the one that stands for it."""
    _take(strangers, {15001: "::", HBONE_PORT: "::"})
    strangers.enroll()
    client, server = strangers.client, strangers.server
    moved = {
        **dict(zip(_MOVED, RESERVED_PORTS, strict=True)),
        "outbound": 15101,
        "hbone": 15108,
    }
    assert _ports(strangers) == [moved, moved]
    status = strangers.mesh.cli("status").stdout
    assert "client: the proxy listens on 15101, as 15001 was taken" in status
    out = strangers.mesh.cli("explain", client.name, f"{server.ipv4}:80").stdout
    assert "the proxy listens on 15101, as somebody had 15001" in out
    inbound = ("explain", server.name, f"{server.ipv4}:15008", "--inbound", client.ipv4)
    explained = json.loads(strangers.mesh.cli(*inbound, "--output=json").stdout)
    assert "the proxy listens on 15108, as somebody had 15008" in str(explained)
    logged = [line for line in strangers.mesh.lines() if "a port is taken" in str(line)]
    assert {(line["port"], line["instead"]) for line in logged} == {
        (15001, 15101),
        (15008, 15108),
    }
