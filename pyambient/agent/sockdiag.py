"""Asking the kernel for one TCP socket by its addresses (sock_diag(7), inet_diag).

For exactly one, not for a list: the answer must come before a proxy that refuses the connection has
closed it.

The kernel answers by the look-up that a segment from outside would meet: where no connection has
these addresses, it finds the listener that would get one, and sk_lookup programs have their say.
"""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

from pyambient.intercept.netlink_socket import NetlinkSocket
from pyambient.model.address import SocketAddress, canonical_ip

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_TCP_LISTEN: Final = 10
_ANY_STATE: Final = 0xFFFFFFFF
# inet_diag_req_v2: family, protocol, extensions, padding, states; then the socket's id.
_REQUEST: Final = struct.Struct("=BBBBI")
# inet_diag_msg: family, state, timer, retransmits; then the socket's id.
_ANSWER: Final = struct.Struct("=BBBB")
_PORTS: Final = struct.Struct("!HH")
_NO_COOKIE: Final = struct.pack("=II", 0xFFFFFFFF, 0xFFFFFFFF)
# Behind family and state: the socket's id, expiry, two queues, the owner.
_INODE_AT: Final = 4 + 48 + 16


class Listener(NamedTuple):
    """A listening socket: its port, and its inode as /proc/PID/fd names it."""

    port: int
    inode: int


class _Found(NamedTuple):
    local: SocketAddress
    remote: SocketAddress
    state: int
    inode: int


class SocketDiagnosis:
    """A sock_diag socket of the namespace that the calling thread is in; needs no privilege."""

    def __init__(self) -> None:
        self._kernel = NetlinkSocket(None, _NETLINK_SOCK_DIAG)

    def connected(self, local: SocketAddress, remote: SocketAddress) -> bool:
        """Whether a TCP socket with just these two addresses exists here, in any state."""
        found = self._find(local, remote)
        if found is None or found.state == _TCP_LISTEN:
            return False
        return (found.local, found.remote) == (local, remote)

    def listener(self, local: SocketAddress, remote: SocketAddress, device: int) -> Listener | None:
        """Who would get a connection from `remote` to `local` that comes in by `device`, an index.

        None if nobody would. Netfilter is not asked, which may turn it to another port before.
        """
        found = self._find(local, remote, device)
        if found is None or found.state != _TCP_LISTEN:
            return None
        return Listener(found.local.port, found.inode)

    def _find(self, local: SocketAddress, remote: SocketAddress, device: int = 0) -> _Found | None:
        try:
            body = self._kernel.get(_SOCK_DIAG_BY_FAMILY, _question(local, remote, device))
        except OSError:
            return None
        if body is None:
            return None
        family, state, _, _ = _ANSWER.unpack_from(body)
        (inode,) = struct.unpack_from("=I", body, _INODE_AT)
        return _Found(*_addresses(family, body[_ANSWER.size :]), state, inode)

    def close(self) -> None:
        self._kernel.close()


def _question(local: SocketAddress, remote: SocketAddress, device: int) -> bytes:
    body = _REQUEST.pack(local.family, socket.IPPROTO_TCP, 0, 0, _ANY_STATE)
    body += _PORTS.pack(local.port, remote.port) + _packed(local) + _packed(remote)
    return body + struct.pack("=I", device) + _NO_COOKIE


def _packed(address: SocketAddress) -> bytes:
    return socket.inet_pton(address.family, address.ip.partition("%")[0]).ljust(16, b"\0")


def _addresses(family: int, raw: bytes) -> tuple[SocketAddress, SocketAddress]:
    """The local and the remote address of an inet_diag_sockid."""
    size = 4 if family == socket.AF_INET else 16
    local_port, remote_port = _PORTS.unpack_from(raw)
    local, remote = raw[4:][:size], raw[20:][:size]
    return (
        SocketAddress(canonical_ip(socket.inet_ntop(family, local)), local_port),
        SocketAddress(canonical_ip(socket.inet_ntop(family, remote)), remote_port),
    )
