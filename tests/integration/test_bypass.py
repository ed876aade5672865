"""What an app without any privilege can do to its socket gets nothing past the mesh."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import PROXY_MARK
from tests.bed import IPPROTO_MPTCP, capturing, has_mptcp, marking

from .conftest import Pair

_MARKER = b"plaintext that must not be on the wire"
# linux/in.h, linux/in6.h and linux/socket.h; the socket module names none of them.
_IP_UNICAST_IF, _IPV6_UNICAST_IF = 50, 76
_MSG_FASTOPEN = 0x20000000
_Trick = Callable[[socket.socket, SocketAddress], None]


def _plainly(client: socket.socket, to: SocketAddress) -> None:
    client.connect(to.sockaddr())
    client.sendall(_MARKER)


def _without_routing(client: socket.socket, to: SocketAddress) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
    _plainly(client, to)


def _by_a_chosen_interface(client: socket.socket, to: SocketAddress) -> None:
    index = struct.pack("!I", socket.if_nametoindex("eth0"))
    if to.is_ipv6:
        client.setsockopt(socket.IPPROTO_IPV6, _IPV6_UNICAST_IF, index)
    else:
        client.setsockopt(socket.IPPROTO_IP, _IP_UNICAST_IF, index)
    _plainly(client, to)


def _by_fast_open(client: socket.socket, to: SocketAddress) -> None:
    client.setblocking(True)  # a timeout would make it answer EINPROGRESS
    client.sendto(_MARKER, _MSG_FASTOPEN, to.sockaddr())


def _bound_to_a_device_once_connected(client: socket.socket, to: SocketAddress) -> None:
    client.connect(to.sockaddr())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    client.sendall(_MARKER)


def _marked_once_connected(mark: int) -> _Trick:
    def trick(client: socket.socket, to: SocketAddress) -> None:
        client.connect(to.sockaddr())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.sendall(_MARKER)

    return trick


def _attempt(trick: _Trick, to: SocketAddress, protocol: int = 0) -> bytes:
    """What comes back of the marker."""
    with socket.socket(to.family, socket.SOCK_STREAM, protocol) as client:
        client.settimeout(5)
        trick(client, to)
        client.shutdown(socket.SHUT_WR)
        return client.recv(1 << 16)


def _assert_captured(pair: Pair, to: SocketAddress, trick: _Trick, protocol: int = 0) -> None:
    """The marker arrives, and is nowhere on the wire."""
    with pair.serve(pair.server, to.port), capturing(pair.client) as capture:
        assert pair.client.run(_attempt, trick, to, protocol) == _MARKER
    assert [str(packet) for packet in capture.packets if _MARKER in packet.payload] == []
    assert [str(packet) for packet in capture.packets if to.port in packet.ports] == []


@pytest.mark.parametrize(
    "trick", [_plainly, _without_routing, _by_a_chosen_interface, _by_fast_open]
)
def test_socket_options_are_no_way_around(
    pair: Pair, destination: SocketAddress, trick: _Trick
) -> None:
    """Options that choose a route or send data early change nothing."""
    _assert_captured(pair, destination, trick)


@pytest.mark.skipif(not has_mptcp(), reason="this kernel is built without CONFIG_MPTCP")
def test_mptcp_is_no_way_around(pair: Pair, destination: SocketAddress) -> None:
    """A multipath socket is captured as a plain one is."""
    _assert_captured(pair, destination, _plainly, IPPROTO_MPTCP)


@pytest.mark.parametrize("backend", ["bpf"], scope="module")
def test_a_device_bound_later_is_no_way_around(pair: Pair, destination: SocketAddress) -> None:
    """A connected socket that binds itself to eth0 stays with the proxy."""
    _assert_captured(pair, destination, _bound_to_a_device_once_connected)


@pytest.mark.parametrize("backend", ["nftables", "iptables"], scope="module")
def test_a_device_bound_later_sends_nothing(pair: Pair, destination: SocketAddress) -> None:
    """With netfilter its bytes are for 127.0.0.1 by now: dropped where they would leave by eth0."""
    with (
        pair.serve(pair.server, destination.port),
        capturing(pair.client) as capture,
        pytest.raises(TimeoutError),
    ):
        pair.client.run(_attempt, _bound_to_a_device_once_connected, destination)
    assert [str(packet) for packet in capture.packets if _MARKER in packet.payload] == []


@pytest.mark.parametrize("mark", [PROXY_MARK, 0])
@pytest.mark.parametrize("backend", ["bpf"], scope="module")
def test_a_mark_set_later_sends_nothing(pair: Pair, destination: SocketAddress, mark: int) -> None:
    """An app that may set marks changes its own once connected: the guard drops what it sends."""
    trick, able = _marked_once_connected(mark), marking(pair.client)
    with (
        pair.serve(pair.server, destination.port),
        capturing(pair.client) as capture,
        pytest.raises(TimeoutError),
    ):
        pair.client.run(_attempt, trick, destination, capabilities=able)
    assert [str(packet) for packet in capture.packets if _MARKER in packet.payload] == []
    assert [str(packet) for packet in capture.packets if destination.port in packet.ports] == []
