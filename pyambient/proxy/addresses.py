"""The addresses of a pod, read from its network namespace.

Needed where nobody tells: istio-cni sends a name and a namespace, nothing else. Dumps by
rtnetlink (RFC 3549) by hand, because a proxy worker does without pyroute2 and its memory.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

from pyambient.model.address import from_sockaddr, is_loopback
from pyambient.netns import Netns

_NLMSGHDR = struct.Struct("=IHHII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTATTR = struct.Struct("=HH")
_RTM_NEWADDR = 20
_RTM_GETADDR = 22
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_REQUEST_DUMP = 0x301
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_DUMP_MAX = 64
_BUFFER = 64 << 10


def pod_addresses(netns: Netns) -> tuple[str, ...]:
    """Every address in `netns` but the loopback ones, in canonical text.

    A dump of one family does not wait for who changes something (Linux 6.10); of all it does.
    """
    found: dict[str, None] = {}
    with netns.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        for family in (socket.AF_INET, socket.AF_INET6):
            size = _NLMSGHDR.size + _IFADDRMSG.size
            header = _NLMSGHDR.pack(size, _RTM_GETADDR, _REQUEST_DUMP, 1, 0)
            sock.send(header + _IFADDRMSG.pack(family, 0, 0, 0, 0))
            found.update(dict.fromkeys(_addresses(sock)))
    return tuple(ip for ip in found if not is_loopback(ip))


def _addresses(sock: socket.socket) -> Iterator[str]:
    for _ in range(_DUMP_MAX):
        packet = sock.recv(_BUFFER)
        while len(packet) >= _NLMSGHDR.size:
            length, kind, *_rest = _NLMSGHDR.unpack_from(packet)
            if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _NLMSGHDR.size:
                return
            if kind == _RTM_NEWADDR:
                yield from _address(packet[_NLMSGHDR.size : length])
            packet = packet[(length + 3) & ~3 :]


def _address(message: bytes) -> Iterator[str]:
    """The local address of one RTM_NEWADDR (IFA_LOCAL where there is one, else IFA_ADDRESS)."""
    family, _prefix, _flags, _scope, index = _IFADDRMSG.unpack_from(message)
    attributes = dict(_attributes(message[_IFADDRMSG.size :]))
    raw = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))
    if raw is None or family not in (socket.AF_INET, socket.AF_INET6):
        return
    ip = socket.inet_ntop(family, raw)
    scope = index if ip.startswith("fe80:") else 0
    yield from_sockaddr((ip, 0, 0, scope)).ip


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    while len(data) >= _RTATTR.size:
        length, kind = _RTATTR.unpack_from(data)
        if length < _RTATTR.size:
            return
        yield kind, data[_RTATTR.size : length]
        data = data[(length + 3) & ~3 :]
