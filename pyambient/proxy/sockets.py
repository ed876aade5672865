"""The proxy's sockets in a pod's network namespace: listeners, upstream sockets, original address.

Sockets carry SO_MARK 0x539, as ztunnel's do: the netfilter backends know the proxy by it. The BPF
ones do not look at it, and there a listener must have no mark: what it accepts then inherits the
captured SYN's 0x111 (net.ipv4.tcp_fwmark_accept), and so do the kernel's answers to it
(fwmark_reflect), which stay on lo. With 0x539 an app that is gone would send its RST to the wire.

Listeners are IP_TRANSPARENT, because a captured connection arrives for an address that is not the
pod's; without it the SYN-ACK is never sent.
"""

from __future__ import annotations

import errno
import itertools
import secrets
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import PROXY_MARK
from pyambient.netns import Netns

_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_SO_ORIGINAL_DST = 80
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xHI16sI")
_TCP_INFO = struct.Struct("=68xI")  # linux/tcp.h: struct tcp_info as far as tcpi_rtt
_BACKLOG = 4096
_STOCK_MAX = 16

# ztunnel's keep-alive: a dead peer is noticed after half an hour at most.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 180),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 180),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 9),
)

# Source ports of connections that keep the client's address. The client's own connection and ours
# to the app have the same addresses and destination port, so ours must not take a port the client
# may use: below the default ip_local_port_range (32768-60999).
_SOURCE_PORTS = range(10000, 30000)
_SOURCE_PORT_TRIES = 64


class Place(NamedTuple):
    """Which of the proxy's workers this is."""

    number: int = 0
    total: int = 1

    @property
    def priority(self) -> int:
        """How the BPF programs are told: SO_PRIORITY while listen() is called; 0 for the only one.

        A listener's priority is inherited by what it accepts, so it is none afterwards.
        """
        return self.total << 8 | self.number if self.total > 1 else 0


ONLY: Final = Place()


def _source_ports(place: Place) -> Iterator[int]:
    """A worker's own, for ever.

    Not from the first on: one that was killed has left connections there that are about to end.
    """
    ports = _SOURCE_PORTS[place.number :: place.total]
    first = secrets.randbelow(len(ports))
    return itertools.cycle(itertools.chain(ports[first:], ports[:first]))


_place = ONLY
_next_source_port = _source_ports(ONLY).__next__


def take_place(place: Place) -> None:
    """Be that worker from here on: one choice a process, made before its first socket."""
    global _place, _next_source_port
    _place, _next_source_port = place, _source_ports(place).__next__


def keep_alive(sock: socket.socket) -> None:
    for level, option, value in _KEEPALIVE:
        sock.setsockopt(level, option, value)


def round_trip(sock: socket.socket) -> float:
    """How long the peer of a connected socket takes to answer, in seconds, as TCP knows it."""
    raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
    (microseconds,) = _TCP_INFO.unpack(raw)
    return float(microseconds) * 1e-6


def set_transparent(sock: socket.socket) -> None:
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def listener_mark(*, netfilter: bool) -> int:
    """The SO_MARK of the pod's TCP listeners."""
    return PROXY_MARK if netfilter else 0


def listener(netns: Netns, port: int, *, netfilter: bool) -> socket.socket:
    """A listener on every address of the pod, both families where the kernel has IPv6.

    PyambientError if the port is taken there.
    """
    for family, wildcard in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):  # noqa: S104 - in the pod
        try:
            mark = listener_mark(netfilter=netfilter)
            return _listen(netns, family, (wildcard, port), mark, _place.priority)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PyambientError(
                    f"port {port} is taken in the pod", "stop what listens there, or look at ss -a"
                ) from None
            if family == socket.AF_INET:
                raise
    raise AssertionError("unreachable")


def _listen(
    netns: Netns, family: int, address: tuple[str, int], mark: int, priority: int
) -> socket.socket:
    sock = netns.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if mark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        set_transparent(sock)
        # A proxy that starts while another drains (upgrade) serves the same ports.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # What it accepts inherits these: five system calls less a connection.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(sock)
        sock.bind(address)
        # What it accepts has a peer's port as its own: an app's bind() to that port must not fail.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if priority:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        sock.listen(_BACKLOG)
        if priority:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 0)
    except OSError:
        sock.close()
        raise
    return sock


class Stock:
    """Sockets of a pod, made ahead: the way into its network namespace costs more than they.

    A pod that needs many gets them by sixteen; `close` gives back what was not taken, and the
    next one is made alone again.
    """

    def __init__(self, netns: Netns, kind: int = socket.SOCK_STREAM) -> None:
        self._netns = netns
        self._kind = kind | socket.SOCK_NONBLOCK
        self._made: dict[int, list[socket.socket]] = {}
        self._batch = 1

    def take(self, family: int) -> socket.socket:
        """A fresh non-blocking socket; OSError if none can be made."""
        made = self._made.get(family)
        if not made:
            made = self._made[family] = self._make(family)
        return made.pop()

    def _make(self, family: int) -> list[socket.socket]:
        """At least the one that is wanted, if there is a descriptor for one and not for all."""
        batch, self._batch = self._batch, 1
        try:
            made = self._netns.sockets(batch, family, self._kind)
        except OSError:
            if batch == 1:
                raise
            return self._netns.sockets(1, family, self._kind)
        self._batch = min(2 * batch, _STOCK_MAX)
        return made

    def close(self) -> None:
        self._batch = 1
        for sock in itertools.chain(*self._made.values()):
            sock.close()
        self._made.clear()

    def __repr__(self) -> str:
        return f"<Stock of {sum(map(len, self._made.values()))} sockets in {self._netns.name}>"


def outbound(stock: Stock, family: int) -> socket.socket:
    """A socket that leaves the pod under the pod's own address."""
    sock = stock.take(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def towards_app(stock: Stock, client: SocketAddress, app: SocketAddress) -> socket.socket:
    """A socket towards an app of the pod that bears the client's IP, so that the app sees it.

    OSError if the kernel refuses, or no source port is free.
    """
    sock = outbound(stock, app.family)
    try:
        # The pod calling itself needs no other address, and a family cannot be changed.
        if client.ip != app.ip and client.family == app.family:
            set_transparent(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind_source(sock, client)
    except OSError:
        sock.close()
        raise
    return sock


def _bind_source(sock: socket.socket, client: SocketAddress) -> None:
    for _ in range(_SOURCE_PORT_TRIES):
        try:
            sock.bind(SocketAddress(client.ip, _next_source_port()).sockaddr())
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRNOTAVAIL, "no source port is free for the client's address")


def original_destination(sock: socket.socket, *, netfilter: bool) -> SocketAddress:
    """Where the app wanted to go.

    With a netfilter backend conntrack knows it (SO_ORIGINAL_DST); with the others the packet was
    never changed and the socket's own address is it. Which of the two is not guessed: an app that
    installs NAT rules of its own could otherwise choose what we believe.
    """
    local = from_sockaddr(sock.getsockname())
    if not netfilter:
        return local
    try:
        if local.family == socket.AF_INET:
            raw = sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, _SOCKADDR_IN.size)
            port, packed = _SOCKADDR_IN.unpack(raw)
            return SocketAddress(socket.inet_ntop(socket.AF_INET, packed), port)
        raw = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
        port, _flow, packed, scope = _SOCKADDR_IN6.unpack(raw)
    except OSError:
        return local
    return from_sockaddr((socket.inet_ntop(socket.AF_INET6, packed), port, 0, scope))
