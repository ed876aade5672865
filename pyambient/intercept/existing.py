"""What a pod has at its enrolment: TCP connections, and UDP sockets connected to resolvers.

Connections are known by the cookies of their sockets.

A cookie is the number that the kernel gives a socket when somebody first asks for it; no other
socket ever gets it (Linux 5.4), and nobody can choose one. A connection that is about to be
accepted has one already, which its socket inherits. So a guard that knows these cookies knows the
connections from before, whatever becomes of their marks, devices and addresses.

sock_diag(7) tells them. For TCP it is asked in its oldest form, TCPDIAG_GETSOCK: that one answers
for both families in one walk through the kernel's table, which all namespaces share.

A UDP socket from before asks its resolver by itself, and no hook sees it do so: the pod's guard
drops that. Its owner would wait for an answer, so the socket is ended; the next one is captured.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError
from pyambient.model.address import is_loopback
from pyambient.model.numbers import RESOLVER_PORT
from pyambient.netns import Netns

from .processes import sub_tree
from .selection import Selection
from .socket_diag import DiagnosisRefused, Socket, dump, end, udp_sockets_to

MOST_CONNECTIONS: Final = 1 << 18
_TCPDIAG_GETSOCK: Final = 18
# inet_diag_req: family, prefixes, extensions; the socket's id; states; a field nobody uses.
_REQUEST: Final = struct.Struct("=4B48xII")
# enum of linux/tcp_states.h: all that have a peer, but TIME_WAIT, which sends without a socket.
_STATES: Final = sum(1 << state for state in (1, 2, 3, 4, 5, 8, 9, 11))


def existing_connections(netns: Netns) -> tuple[Socket, ...]:
    """The connections that leave the namespace, those in the making included.

    One with both of its ends in here stays in here: it is an app's with itself, or with the proxy
    that has just captured it.
    """
    found = list(_connections(netns))
    ends = {(connection.local, connection.remote) for connection in found}
    return tuple(c for c in found if (c.remote, c.local) not in ends)


def _connections(netns: Netns) -> Iterator[Socket]:
    """PyambientError where the kernel cannot tell, or there are too many."""
    asked = _REQUEST.pack(0, 0, 0, 0, _STATES, 0)
    try:
        for count, connection in enumerate(dump(netns, _TCPDIAG_GETSOCK, asked)):
            if count == MOST_CONNECTIONS:
                raise PyambientError(
                    f"{netns.name} has more than {MOST_CONNECTIONS} TCP connections",
                    "enrol it when it has fewer, or with --guard off",
                )
            yield connection
    except DiagnosisRefused as error:
        reason = errno.errorcode.get(error.errno or 0, str(error.errno))
        raise PyambientError(
            f"the kernel does not list TCP connections ({reason})",
            "load its module tcp_diag, or enrol with --guard off",
        ) from None


def end_older_queries(
    netns: Netns, outbound: Selection, own: Collection[str], proxy: Path | None
) -> int:
    """End the UDP sockets that ask a resolver past the proxy; how many there were.

    Those that ask the pod itself, or what `outbound` excludes, may go on. `proxy` is the cgroup of
    the proxy. UnsupportedFeature or OSError where the kernel cannot do it.
    """
    proxies = cgroups_of(proxy)

    def is_passed_by(asking: Socket) -> bool:
        ip = asking.remote_ip
        inside = is_loopback(ip) or ip in own
        return not inside and asking.cgroup not in proxies and outbound.captures(ip, RESOLVER_PORT)

    found = filter(is_passed_by, list(udp_sockets_to(netns, RESOLVER_PORT)))
    return end(netns, socket.IPPROTO_UDP, found)


def cgroups_of(proxy: Path | None) -> frozenset[int]:
    """The ids of a cgroup and those below it; an id is the inode number of a directory."""
    return frozenset() if proxy is None else frozenset(d.stat().st_ino for d in sub_tree(proxy))
