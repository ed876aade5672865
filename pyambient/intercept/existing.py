"""The TCP connections that a pod has at its enrolment, by the cookies of their sockets.

A cookie is the number that the kernel gives a socket when somebody first asks for it; no other
socket ever gets it (Linux 5.4), and nobody can choose one. A connection that is about to be
accepted has one already, which its socket inherits. So a guard that knows these cookies knows the
connections from before, whatever becomes of their marks, devices and addresses.

sock_diag(7) tells them. It is asked in its oldest form, TCPDIAG_GETSOCK: that one answers for both
families in one walk through the kernel's table, which all namespaces share.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyambient.errors import PyambientError
from pyambient.netns import Netns

MOST_CONNECTIONS: Final = 1 << 18
_NETLINK_SOCK_DIAG: Final = 4
_TCPDIAG_GETSOCK: Final = 18
_REQUEST_AND_DUMP: Final = 0x1 | 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
# inet_diag_req: family, prefixes, extensions; the socket's id; states; a field nobody uses.
_REQUEST: Final = struct.Struct("=4B48xII")
# inet_diag_msg: family, state, timer, retransmits; the socket's id: ports and addresses in
# network order, device, cookie.
_ANSWER: Final = struct.Struct("=4B4s16s16sIQ")
_BUFFER: Final = 1 << 18
# enum of linux/tcp_states.h: all that have a peer, but TIME_WAIT, which sends without a socket.
_STATES: Final = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))
_MAPPED: Final = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class _Connection:
    local: bytes
    remote: bytes
    cookie: int


def existing_connections(netns: Netns) -> frozenset[int]:
    """Cookies of the connections that leave the namespace, those in the making included.

    One with both of its ends in here stays in here: it is an app's with itself, or with the proxy
    that has just captured it.
    """
    found = list(_connections(netns))
    ends = {(connection.local, connection.remote) for connection in found}
    return frozenset(c.cookie for c in found if (c.remote, c.local) not in ends)


def _connections(netns: Netns) -> Iterator[_Connection]:
    """PyambientError where the kernel cannot tell, or there are too many."""
    with netns.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as kernel:
        body = _REQUEST.pack(0, 0, 0, 0, _STATES, 0)
        size = _HEADER.size + len(body)
        kernel.send(_HEADER.pack(size, _TCPDIAG_GETSOCK, _REQUEST_AND_DUMP, 1, 0) + body)
        for count, message in enumerate(_messages(kernel)):
            if count == MOST_CONNECTIONS:
                raise PyambientError(
                    f"{netns.name} has more than {MOST_CONNECTIONS} TCP connections",
                    "enrol it when it has fewer, or with --guard off",
                )
            yield _read(message)


def _messages(kernel: socket.socket) -> Iterator[memoryview]:
    while True:
        received = memoryview(kernel.recv(_BUFFER))
        while received:
            size, kind, *_ = _HEADER.unpack_from(received)
            if kind == _NLMSG_DONE:
                return
            if kind == _NLMSG_ERROR:
                raise _refusal(received)
            yield received[_HEADER.size : size]
            received = received[(size + 3) & ~3 :]


def _refusal(message: memoryview) -> PyambientError:
    (code,) = struct.unpack_from("=i", message, _HEADER.size)
    reason = errno.errorcode.get(-code, str(-code))
    return PyambientError(
        f"the kernel does not list TCP connections ({reason})",
        "load its module tcp_diag, or enrol with --guard off",
    )


def _read(message: memoryview) -> _Connection:
    family, _, _, _, ports, local, remote, _, cookie = _ANSWER.unpack_from(message)
    if family == socket.AF_INET:
        local, remote = _MAPPED + local[:4], _MAPPED + remote[:4]
    return _Connection(local + ports[:2], remote + ports[2:], cookie)
