"""Traffic between two enrolled pods, seen from the apps, from the wire and from the access log."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import (
    HBONE_PORT,
    PROBE_ADDRESS_V4,
    PROBE_ADDRESS_V6,
    PROXY_MARK,
    RESERVED_PORTS,
)
from tests.bed import Channel, Child, ClientOptions, apps, capturing, marking

from .conftest import Pair, assert_all_tunnelled

_MARKER = b"plaintext that must not be on the wire"
# With netfilter alone the proxy is known by its mark, which an app that may set marks can forge.
_ONLY_BPF = pytest.mark.parametrize("backend", ["bpf"], scope="module")
_WITHOUT_NETFILTER = pytest.mark.parametrize("backend", ["bpf", "tc"], scope="module")


def test_traffic_is_tunnelled(pair: Pair, echo: Child, destination: SocketAddress) -> None:
    """What one pod says to the other is on the wire as HBONE only, and arrives."""
    with capturing(pair.client) as sent, capturing(pair.server) as received:
        seen = pair.client.run(apps.request, destination, _MARKER)
    assert (seen.data, seen.errno) == (_MARKER, None)
    for capture in (sent, received):
        assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)


def test_names_are_true(pair: Pair, echo: Child, destination: SocketAddress, family: str) -> None:
    """Both apps see the other's address, as if no proxy were between them."""
    seen = pair.client.run(apps.request, destination)
    assert seen.peer == destination
    assert seen.local.ip == pair.client.address(family)
    (accepted,) = echo.ask("accepted")
    assert accepted.local == destination
    assert accepted.peer.ip == pair.client.address(family)


def test_both_proxies_log_the_connection(
    pair: Pair, echo: Child, destination: SocketAddress, family: str
) -> None:
    """One line at each end, with the original destination and both identities."""
    seen = pair.client.run(apps.request, destination, b"12345")
    address = SocketAddress(pair.server.address(family), HBONE_PORT)
    common = {
        "src.identity": "spiffe://cluster.local/ns/default/sa/client",
        "dst.identity": "spiffe://cluster.local/ns/default/sa/server",
        "dst.addr": str(address),
        "dst.hbone_addr": str(destination),
        "bytes_sent": 5,
        "bytes_recv": 5,
    }
    outbound = common | {"direction": "outbound", "src.addr": str(seen.local)}
    assert len(pair.mesh.access_log(outbound)) == 1
    inbound = pair.mesh.access_log(common | {"direction": "inbound"})
    ip = pair.client.address(family)
    assert all(line["src.addr"].startswith((f"{ip}:", f"[{ip}]:")) for line in inbound)


def test_each_port_reaches_its_own_app(pair: Pair, echo: Child, family: str) -> None:
    """The original destination decides, not the listener that a connection was captured by."""
    with pair.serve(pair.server, 8081) as second:
        for port in (8080, 8081, 8081):
            pair.client.run(apps.request, SocketAddress(pair.server.address(family), port))
        ports = [[one.local.port for one in app.ask("accepted")] for app in (echo, second)]
    assert ports == [[8080], [8081, 8081]]


def test_the_other_way_round(pair: Pair, family: str) -> None:
    """An enrolled pod is client and server at once."""
    with pair.serve(pair.client, 8080) as echo, capturing(pair.server) as capture:
        there = SocketAddress(pair.client.address(family), 8080)
        assert pair.server.run(apps.request, there, _MARKER).data == _MARKER
        (accepted,) = echo.ask("accepted")
    assert accepted.peer.ip == pair.server.address(family)
    assert_all_tunnelled(capture, pair.server, pair.client, _MARKER)


def test_an_ipv6_socket_to_ipv4_is_captured(pair: Pair, echo: Child) -> None:
    """A client of the v4-mapped form, as Java and Go make them, is no way around."""
    destination = SocketAddress(pair.server.address("v4"), 8080)
    options = ClientOptions(v4_mapped=True)
    with capturing(pair.client) as capture:
        seen = pair.client.run(apps.request, destination, _MARKER, options)
    assert (seen.data, seen.peer) == (_MARKER, destination)
    assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)


def test_a_bound_source_is_kept(
    pair: Pair, echo: Child, destination: SocketAddress, family: str
) -> None:
    """A client that binds to its pod's address is captured, and is seen under it."""
    options = ClientOptions(source=pair.client.address(family))
    with capturing(pair.client) as capture:
        seen = pair.client.run(apps.request, destination, _MARKER, options)
    assert (seen.data, seen.local.ip) == (_MARKER, pair.client.address(family))
    assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)


def test_a_device_bound_client_is_no_way_around(pair: Pair, family: str) -> None:
    """Bound to eth0 as nobody: captured by BPF; with netfilter it gets nothing out."""
    there = SocketAddress(pair.server.address(family), 8081)
    options = ClientOptions(device="eth0", timeout=2)
    with pair.serve(pair.server, 8081), capturing(pair.client) as capture:
        seen = pair.client.run(apps.request, there, _MARKER, options)
    if pair.backend in ("bpf", "tc"):
        assert (seen.data, seen.peer) == (_MARKER, there)
        assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)
    else:
        assert (seen.stage, seen.errno) == ("connect", errno.ETIMEDOUT)
        assert [str(packet) for packet in capture.packets if 8081 in packet.ports] == []


def test_a_refused_port_is_refused_at_once(pair: Pair, family: str) -> None:
    """No app on the port: the client is reset, long before it would time out."""
    nowhere = SocketAddress(pair.server.address(family), 9)
    seen = pair.client.run(apps.request, nowhere, options=ClientOptions(timeout=5))
    assert seen.errno in (errno.ECONNRESET, errno.EPIPE)
    assert seen.data == b""


def test_hairpin_is_untouched(pair: Pair, family: str) -> None:
    """A pod's connection to its own address goes straight to the app, source port and all."""
    own = SocketAddress(pair.client.address(family), 8082)
    with pair.serve(pair.client, 8082) as echo:
        seen = pair.client.run(apps.request, own)
        (accepted,) = echo.ask("accepted")
    assert (seen.data, seen.peer) == (b"hello", own)
    assert accepted.peer == seen.local


def test_localhost_is_untouched(pair: Pair, family: str) -> None:
    """So does one to the loopback address."""
    host = "127.0.0.1" if family == "v4" else "::1"
    with pair.serve(pair.client, 8083, host) as echo:
        seen = pair.client.run(apps.request, SocketAddress(host, 8083))
        (accepted,) = echo.ask("accepted")
    assert seen.data == b"hello"
    assert accepted.peer == seen.local


def test_a_half_close_stays_one(pair: Pair, family: str) -> None:
    """The server's answer after the client's end of stream arrives whole."""
    data = os.urandom(1 << 20)
    with pair.serve(pair.server, 8084, at_eof=True):
        seen = pair.client.run(apps.request, SocketAddress(pair.server.address(family), 8084), data)
    assert (seen.stage, seen.data == data) == ("done", True)


def test_the_servers_half_close_stays_one(pair: Pair, family: str) -> None:
    """A server that has said its last word still hears the client out."""
    there = SocketAddress(pair.server.address(family), 8087)

    def speak_first(channel: Channel) -> bytes:
        with apps.listener(there.port) as listening:
            channel.send("listening")
            connection, _ = listening.accept()
        with connection:
            connection.sendall(b"last word")
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def answer_the_last_word() -> bytes:
        with socket.create_connection(there, timeout=10) as client:
            heard = b"".join(iter(lambda: client.recv(1 << 16), b""))
            client.sendall(b"x" * (1 << 20))
        return heard

    with pair.server.spawn(speak_first) as server:
        server.receive()
        assert pair.client.run(answer_the_last_word) == b"last word"
        assert server.wait() == b"x" * (1 << 20)


def test_the_servers_reset_stays_one(pair: Pair, family: str) -> None:
    """A client whose server resets the connection is told so, not that all was said."""
    there = SocketAddress(pair.server.address(family), 8088)

    def hang_up(channel: Channel) -> None:
        with apps.listener(there.port) as listening:
            channel.send("listening")
            connection, _ = listening.accept()
        while connection.recv(1 << 16):
            pass
        _reset(connection)

    with pair.server.spawn(hang_up) as server:
        server.receive()
        seen = pair.client.run(apps.request, there)
    assert (seen.stage, seen.errno) == ("receive", errno.ECONNRESET)


def test_the_clients_reset_stays_one(pair: Pair, family: str) -> None:
    """And so is a server whose client does."""
    there = SocketAddress(pair.server.address(family), 8089)

    def listen_on(channel: Channel) -> int | None:
        with apps.listener(there.port) as listening:
            channel.send("listening")
            connection, _ = listening.accept()
        with connection:
            connection.sendall(b"x")
            try:
                connection.recv(1)
            except ConnectionResetError as error:
                return error.errno
            return None

    def hang_up() -> None:
        client = socket.create_connection(there, timeout=10)
        client.recv(1)
        _reset(client)

    with pair.server.spawn(listen_on) as server:
        server.receive()
        pair.client.run(hang_up)
        assert server.wait() == errno.ECONNRESET


def _reset(connection: socket.socket) -> None:
    """Close with a RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_thousand_connections_are_held(
    pair: Pair, echo: Child, destination: SocketAddress
) -> None:
    """A thousand at a time are open, answer, and answer again."""
    with pair.client.spawn(apps.hold, destination, 1000) as holder:
        assert holder.receive(timeout=60) == {}
        assert len(echo.ask("accepted")) == 1000
        assert holder.ask("ping", timeout=60) == {}


def test_a_pod_outside_the_mesh_reaches_in(
    pair: Pair, echo: Child, destination: SocketAddress, family: str
) -> None:
    """Plaintext from outside is captured and passed on under the client's own address."""
    seen = pair.outside.run(apps.request, destination)
    assert (seen.data, seen.peer) == (b"hello", destination)
    (accepted,) = echo.ask("accepted")
    assert (accepted.peer.ip, accepted.local) == (pair.outside.address(family), destination)
    assert accepted.peer.port != seen.local.port, "it did not pass the proxy"
    pair.mesh.access_log({"direction": "inbound", "src.addr": str(seen.local)})


def test_the_node_reaches_in(
    pair: Pair, echo: Child, destination: SocketAddress, family: str
) -> None:
    """A health probe gets its answer; the app sees the node, with netfilter Istio's address."""
    seen = pair.bed.node.address(family)
    if pair.backend in ("nftables", "iptables"):
        seen = PROBE_ADDRESS_V4 if family == "v4" else PROBE_ADDRESS_V6
    assert pair.bed.node.run(apps.request, destination).data == b"hello"
    (accepted,) = echo.ask("accepted")
    assert accepted.peer.ip == seen


def test_a_pod_outside_the_mesh_is_reached(pair: Pair, family: str) -> None:
    """What is not in the mesh is passed through as it is, under the client's own address."""
    there = SocketAddress(pair.outside.address(family), 8085)
    with pair.serve(pair.outside, 8085) as echo:
        seen = pair.client.run(apps.request, there)
        (accepted,) = echo.ask("accepted")
    assert (seen.data, seen.peer) == (b"hello", there)
    assert accepted.peer.ip == pair.client.address(family)
    pair.mesh.access_log({"direction": "outbound", "src.addr": str(seen.local)})


def test_udp_is_untouched(pair: Pair, family: str) -> None:
    """Datagrams are none of the mesh's business."""
    there = SocketAddress(pair.server.address(family), 5300)
    server = pair.server.spawn(apps.udp_echo, 5300)
    assert server.receive() == "listening"
    with server:
        assert pair.client.run(apps.udp_request, there).data == b"hello"


@_WITHOUT_NETFILTER
def test_the_proxys_mark_is_no_pass(pair: Pair, echo: Child, destination: SocketAddress) -> None:
    """An app that may set marks and sets the proxy's is captured like any other."""
    options = ClientOptions(mark=PROXY_MARK)
    with capturing(pair.client) as capture:
        seen = pair.client.run(
            apps.request, destination, _MARKER, options, capabilities=marking(pair.client)
        )
    assert (seen.data, seen.peer) == (_MARKER, destination)
    assert_all_tunnelled(capture, pair.client, pair.server, _MARKER)


@_ONLY_BPF
@pytest.mark.parametrize("port", RESERVED_PORTS)
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1", "::1", "10.77.0.2", "fd77::2"])
def test_nobody_takes_the_proxys_ports(pair: Pair, port: int, host: str) -> None:
    """An app cannot bind them, on any address, whatever it sets on its socket."""

    def bind() -> int:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as taker:
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            taker.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
            with pytest.raises(PermissionError) as caught:
                taker.bind((host, port))
        return int(caught.value.errno or 0)

    assert pair.client.run(bind, capabilities=marking(pair.client)) == errno.EPERM
