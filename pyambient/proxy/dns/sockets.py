"""The forwarder's UDP sockets, in the pod's network namespace.

The listener is told the destination of each datagram (pktinfo, RFC 3542 section 6), because the
answer must come from just that address. That may be none of the pod's, so it is IP_TRANSPARENT. It
has a mark where the TCP listeners have one (`proxy/sockets.py`). With backend `tc` that is
LOOPBACK_MARK: by it answers pass lo, where they get their port, also if they are for somebody
behind the pod, and what the kernel says of one that nobody awaits stays inside (fwmark_reflect).

A query goes out from a socket of its own, connected, on a port that the kernel chooses: all of
ip_local_port_range, less what the pod has reserved, by a generator that nobody can predict (since
Linux 5.10, whose prandom_u32 is built like SipHash; get_random_u32 later). RFC 5452 section 9.2
wants the range as large as is practicable. Larger would not be: outside of that range the apps of
the pod bind ports of their own choice, and must find them free. A forger who knows all else has to
guess about 15 bits of port and 16 of id, within the one answer's time.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from pyambient.errors import PyambientError
from pyambient.model.address import SocketAddress, from_sockaddr
from pyambient.model.numbers import LOOPBACK_MARK, PROXY_MARK
from pyambient.netns import Netns
from pyambient.proxy.sockets import Stock, set_transparent

_IP_PKTINFO = 8
_IP_MTU_DISCOVER, _IP_PMTUDISC_DONT = 10, 0
_RECEIVE_BUFFER = 1 << 20
_IN_PKTINFO = struct.Struct("=I4s4s")  # device, address to answer from, destination in the header
_IN6_PKTINFO = struct.Struct("=16sI")
ANCILLARY_SIZE: Final = socket.CMSG_SPACE(_IN6_PKTINFO.size)
Ancillary = Sequence[tuple[int, int, bytes]]


_MARKS: Final = {"tc": LOOPBACK_MARK, "nftables": PROXY_MARK, "iptables": PROXY_MARK}


def mark_answers(sock: socket.socket, backend: str) -> None:
    """Have what a listener sends from now on bear the mark that this backend wants, or none."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, _MARKS.get(backend, 0))


def datagram_listener(netns: Netns, backend: str, port: int) -> socket.socket:
    """A UDP socket on every address of the pod, both families where the kernel has IPv6.

    PyambientError if the port is taken there.
    """
    try:
        return _bound(netns, socket.AF_INET6, ("::", port), backend)
    except OSError as error:
        _explain_taken(error, port)
    try:
        return _bound(netns, socket.AF_INET, ("0.0.0.0", port), backend)  # noqa: S104 - in the pod
    except OSError as error:
        _explain_taken(error, port)
        raise


def _explain_taken(error: OSError, port: int) -> None:
    if error.errno == errno.EADDRINUSE:
        raise PyambientError(
            f"UDP port {port} is taken in the pod", "stop what listens there, or look at ss -au"
        ) from None


def _bound(netns: Netns, family: int, address: tuple[str, int], backend: str) -> socket.socket:
    sock = netns.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        mark_answers(sock, backend)
        # An answer that fits lo may not fit the link to who is behind the pod: let it be divided.
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DONT)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        set_transparent(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Room for a burst: the kernel drops silently what does not fit.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def upstream(stock: Stock, resolver: SocketAddress) -> socket.socket:
    """A connected UDP socket for one query: the kernel lets nobody but the resolver answer.

    OSError if there is no route, no port or no descriptor.
    """
    sock = stock.take(resolver.family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
        sock.connect(resolver.sockaddr())
    except OSError:
        sock.close()
        raise
    return sock


class Arrival(NamedTuple):
    """Where a datagram came to: the IP in canonical text, and how to answer from there."""

    ip: str
    answering: Ancillary


def arrival(ancillary: Ancillary) -> Arrival | None:
    """The destination of a received datagram; None if the kernel does not say.

    The device is given back for a link-local address alone, which means nothing without it; else
    the answer goes where the pod's routes say.
    """
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            packed, device = _IN6_PKTINFO.unpack_from(data)
            scope = device if packed.startswith(b"\xfe\x80") else 0
            ip = from_sockaddr((socket.inet_ntop(socket.AF_INET6, packed), 0, 0, scope)).ip
            return Arrival(ip, ((level, kind, _IN6_PKTINFO.pack(packed, scope)),))
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            _, _, packed = _IN_PKTINFO.unpack_from(data)
            ip = socket.inet_ntop(socket.AF_INET, packed)
            return Arrival(ip, ((level, kind, _IN_PKTINFO.pack(0, packed, bytes(4))),))
    return None
