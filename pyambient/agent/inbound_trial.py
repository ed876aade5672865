"""Who gets a connection that comes to a pod from outside.

Where sk_lookup programs steer, the kernel is asked: sock_diag looks a socket up as a SYN does, and
nothing is sent. A redirect of netfilter's has to see a packet, and one that comes from outside:
what the node's own sockets send is a health probe, and goes past the proxy. So a SYN is put on the
node's end of the pod's veth, and conntrack in the pod tells where it was turned to. The SYN claims
a signature (RFC 2385) that no listener of the proxy expects, so it is dropped where it arrives:
nothing is answered, and no connection begins.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyambient.intercept.ctnetlink import Conntrack, Flow
from pyambient.intercept.node_guard import peer_index
from pyambient.intercept.socket_diag import Socket, find
from pyambient.model.address import SocketAddress
from pyambient.netns import Netns

from .departures import TARGETS

_CLIENT_PORT: Final = 33333
_SIOCGIFHWADDR: Final = 0x8927
_ETH_P: Final = {socket.AF_INET: 0x0800, socket.AF_INET6: 0x86DD}
_SYN: Final = 0x02
# Two no-ops, then an option 19 of 18 bytes.
_SIGNATURE: Final = b"\1\1\x13\x12" + bytes(16)
_ATTEMPTS: Final = 3
_PATIENCE: Final = 0.3


@dataclass(frozen=True, slots=True)
class Entrance:
    """An address of a pod, and the device that has it."""

    netns: Netns
    ip: str
    device: str

    @property
    def family(self) -> str:
        return "IPv6" if ":" in self.ip else "IPv4"

    @property
    def own(self) -> SocketAddress:
        """Where the trial knocks: a port on which nobody has to listen."""
        return SocketAddress(self.ip, TARGETS[self.family].port)

    @property
    def client(self) -> SocketAddress:
        return SocketAddress(TARGETS[self.family].ip, _CLIENT_PORT)


def listener_of(entrance: Entrance, port: int) -> Socket | None:
    """Who would get a client's connection to this port of the entrance, netfilter aside."""
    with entrance.netns.entered():
        device = socket.if_nametoindex(entrance.device)
    found = find(entrance.netns, SocketAddress(entrance.ip, port), entrance.client, device)
    return found if found is not None and found.listens else None


def steered(entrance: Entrance, own: SocketAddress, listener: int) -> str:
    """Ask where sk_lookup sends a connection to `own`; what is wrong with that, or empty.

    `listener` is the port where it should end.
    """
    found = listener_of(entrance, own.port)
    if found is None:
        return f"nobody gets a connection to {own}: it is refused"
    if found.port != listener:
        return f"a connection to {own} goes to port {found.port}, past the proxy"
    return ""


def can_knock(entrance: Entrance) -> bool:
    """Whether a packet can be put into the pod's device from this network namespace."""
    return peer_index(entrance.netns, entrance.device) is not None


def redirected(entrance: Entrance, own: SocketAddress, listener: int) -> str:
    """Send a SYN to `own` and see where netfilter turns it to; as `steered`."""
    opening = Flow(entrance.client, own)
    with Conntrack(entrance.netns, socket.IPPROTO_TCP) as conntrack:
        answers = None
        for _ in range(_ATTEMPTS):
            conntrack.forget(opening)
            _knock(entrance, own)
            answers = next(_awaited(conntrack, opening), None)
            if answers is not None:
                break
        conntrack.forget(opening)
    if answers is None:
        return f"a SYN from {entrance.client.ip} to {own} was not redirected"
    if answers.source.port != listener:
        return f"a SYN to {own} went to port {answers.source.port}, past the proxy"
    if listener_of(entrance, listener) is None:
        return f"nobody listens on {listener}"
    return ""


def _awaited(conntrack: Conntrack, opening: Flow) -> Iterator[Flow]:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if (answers := conntrack.answers(opening)) is not None:
            yield answers
        time.sleep(0.005)


def _knock(entrance: Entrance, own: SocketAddress) -> None:
    """Put a SYN of the client's into the pod's device; OSError if its other end is not here."""
    client = entrance.client
    with entrance.netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as inside:
        request = struct.pack("16s24x", entrance.device.encode())
        hardware = fcntl.ioctl(inside, _SIOCGIFHWADDR, request)[18:24]
    index = peer_index(entrance.netns, entrance.device) or 0
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as outside:
        where = (socket.if_indextoname(index), _ETH_P[own.family], 0, 0, hardware)
        outside.sendto(syn(client, own), where)


def syn(source: SocketAddress, destination: SocketAddress) -> bytes:
    """An IP packet with a SYN that claims a signature (RFC 9293 section 3.1, RFC 2385)."""
    addresses = b"".join(socket.inet_pton(end.family, end.ip) for end in (source, destination))
    ports = struct.pack("!HH", source.port, destination.port)
    header = ports + struct.pack("!IIBBHHH", 0, 0, 10 << 4, _SYN, 1024, 0, 0) + _SIGNATURE
    pseudo = addresses + struct.pack("!II", len(header), socket.IPPROTO_TCP)
    segment = header[:16] + _checksum(pseudo + header) + header[18:]
    if destination.is_ipv6:
        first = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
        return first + addresses + segment
    size = 20 + len(segment)
    first = struct.pack("!BBHHHBB", 0x45, 0, size, 0, 0, 64, socket.IPPROTO_TCP)
    return first + _checksum(first + b"\0\0" + addresses) + addresses + segment


def _checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
