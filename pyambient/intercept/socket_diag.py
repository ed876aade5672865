"""The TCP and UDP sockets of a network namespace, listed and ended by sock_diag(7).

To end a socket is what `ss -K` does: its owner gets ECONNABORTED, a TCP peer a reset. A socket is
named by the kernel's own struct inet_diag_sockid, in which its cookie is: none that comes to have
the same addresses meanwhile is ended in its place.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from pyambient.errors import UnsupportedFeature
from pyambient.model.address import SocketAddress, canonical_ip, packed_ip
from pyambient.netns import Netns

from .netlink_socket import NetlinkSocket, attributes_of

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_SOCK_DESTROY: Final = 21
# inet_diag_req_v2: family, protocol, extensions, states; the socket's id.
_REQUEST_V2: Final = struct.Struct("=BBBxI48s")
# inet_diag_sockid: ports and addresses in network order, device, cookie.
_IDENTITY_SIZE: Final = 48
_ADDRESS_SIZE: Final = 16
_TO_PORT: Final = struct.Struct("!2xH44x")
_FROM_PORT: Final = struct.Struct("!H46x")
# Ports, addresses, the device, and a cookie that stands for any.
_ENDS: Final = struct.Struct("!HH16s16s")
_ANYWHERE: Final = struct.Struct("=I8s")
_ANY_COOKIE: Final = b"\xff" * 8
# inet_diag_msg: family, state, timer, retransmits; the socket's id; what nobody here needs; inode.
_ANSWER: Final = struct.Struct("=BB2x48s16xI")
_INET_DIAG_MARK: Final = 15
_INET_DIAG_CGROUP_ID: Final = 21
_TCP_ESTABLISHED: Final = 1
_TCP_LISTEN: Final = 10
_ALL_STATES: Final = 0xFFFFFFFF
_MAPPED: Final = bytes(10) + b"\xff\xff"
_GONE: Final = frozenset((errno.ENOENT, errno.ESTALE))
_CANNOT: Final = frozenset((errno.EOPNOTSUPP, errno.EINVAL))


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket: its family, its struct inet_diag_sockid, and the attributes it was told with.

    `inode` is 0 where no process has it any more, `state` one of TCP's.
    """

    family: int
    identity: bytes
    attributes: bytes
    inode: int = 0
    state: int = 0

    @property
    def cookie(self) -> int:
        return int.from_bytes(self.identity[40:48], sys.byteorder)

    @property
    def local(self) -> bytes:
        """Address and port, of both families in one form."""
        return self._packed(self.identity[4:20]) + self.identity[0:2]

    @property
    def remote(self) -> bytes:
        return self._packed(self.identity[20:36]) + self.identity[2:4]

    @property
    def port(self) -> int:
        return int.from_bytes(self.identity[0:2])

    @property
    def listens(self) -> bool:
        return self.state == _TCP_LISTEN

    @property
    def remote_ip(self) -> str:
        return canonical_ip(socket.inet_ntop(socket.AF_INET6, self.remote[:16]))

    @property
    def mark(self) -> int:
        return self._attribute(_INET_DIAG_MARK)

    @property
    def cgroup(self) -> int:
        """The id of the cgroup that it was made in; 0 before Linux 5.7."""
        return self._attribute(_INET_DIAG_CGROUP_ID)

    def _attribute(self, wanted: int) -> int:
        return int.from_bytes(attributes_of(self.attributes).get(wanted, b""), sys.byteorder)

    def _packed(self, ip: bytes) -> bytes:
        return _MAPPED + ip[:4] if self.family == socket.AF_INET else ip


class DiagnosisRefused(OSError):
    """The kernel does not list sockets of this kind."""


def dump(netns: Netns, kind: int, body: bytes) -> Iterator[Socket]:
    """Ask for sockets by a request of this type."""
    with _diagnosis(netns) as kernel:
        answers = kernel.each(kind, body)
        while (answer := _next(answers)) is not None:
            yield _told(answer)


def _told(answer: bytes) -> Socket:
    family, state, identity, inode = _ANSWER.unpack_from(answer)
    return Socket(family, identity, answer[_ANSWER.size :], inode, state)


def _next(answers: Iterator[bytes]) -> bytes | None:
    try:
        return next(answers, None)
    except OSError as error:
        raise DiagnosisRefused(error.errno, error.strerror) from None


def udp_sockets_to(netns: Netns, port: int) -> Iterator[Socket]:
    """The UDP sockets that are connected to this port."""
    yield from _sockets(netns, socket.IPPROTO_UDP, 1 << _TCP_ESTABLISHED, _TO_PORT.pack(port))


def sockets_from(netns: Netns, protocol: int, port: int) -> Iterator[Socket]:
    """The sockets that have this port as their own."""
    yield from _sockets(netns, protocol, _ALL_STATES, _FROM_PORT.pack(port))


def _sockets(netns: Netns, protocol: int, states: int, identity: bytes) -> Iterator[Socket]:
    for family in (socket.AF_INET, socket.AF_INET6):
        asked = _REQUEST_V2.pack(family, protocol, 0, states, identity)
        yield from dump(netns, _SOCK_DIAG_BY_FAMILY, asked)


def find(
    netns: Netns | None, local: SocketAddress, remote: SocketAddress, device: int = 0
) -> Socket | None:
    """The TCP socket that gets a segment from `remote` to `local`, by a device with this index.

    The kernel looks for it as for a segment from outside: where no connection has these addresses,
    it finds the listener that would get one, and sk_lookup programs have their say. Netfilter is
    not asked, which may turn it to another port before. Exactly one is asked for, not a list: the
    answer comes before a proxy that refuses the connection has closed it.

    Without a `netns`, in that of the calling thread, and that needs no privilege.
    """
    ends = _ENDS.pack(local.port, remote.port, _padded(local), _padded(remote))
    identity = ends + _ANYWHERE.pack(device, _ANY_COOKIE)
    asked = _REQUEST_V2.pack(local.family, socket.IPPROTO_TCP, 0, _ALL_STATES, identity)
    with _diagnosis(netns) as kernel, contextlib.suppress(OSError):
        answer = kernel.get(_SOCK_DIAG_BY_FAMILY, asked)
        return None if answer is None else _told(answer)
    return None


def _padded(address: SocketAddress) -> bytes:
    ip = address.ip.partition("%")[0]
    return socket.inet_pton(address.family, ip).ljust(_ADDRESS_SIZE, b"\0")


def is_connected(local: SocketAddress, remote: SocketAddress) -> bool:
    """Whether a TCP socket with just these ends is in the calling thread's network namespace."""
    found = find(None, local, remote)
    if found is None or found.listens:
        return False
    return (found.local, found.remote) == (_end(local), _end(remote))


def _end(address: SocketAddress) -> bytes:
    return packed_ip(address.ip) + address.port.to_bytes(2)


def end(netns: Netns, protocol: int, sockets: Iterable[Socket]) -> int:
    """End these sockets; how many of them still were there.

    UnsupportedFeature where the kernel cannot (CONFIG_INET_DIAG_DESTROY).
    """
    with _diagnosis(netns) as kernel:
        return sum(_end_one(kernel, protocol, each) for each in sockets)


def refuse_unable(netns: Netns) -> None:
    """UnsupportedFeature where the kernel ends no sockets; nothing is ended."""
    end(netns, socket.IPPROTO_TCP, [Socket(socket.AF_INET, bytes(_IDENTITY_SIZE), b"")])


def _end_one(kernel: NetlinkSocket, protocol: int, which: Socket) -> bool:
    body = _REQUEST_V2.pack(which.family, protocol, 0, _ALL_STATES, which.identity)
    try:
        kernel.change(_SOCK_DESTROY, 0, body)
    except OSError as error:
        if error.errno in _GONE:
            return False
        if error.errno not in _CANNOT:
            raise
        raise UnsupportedFeature(
            "ending of sockets (CONFIG_INET_DIAG_DESTROY)",
            "4.5",
            "end the processes that have them",
        ) from None
    return True


def _diagnosis(netns: Netns | None) -> NetlinkSocket:
    return NetlinkSocket(netns, _NETLINK_SOCK_DIAG)
