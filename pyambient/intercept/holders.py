"""Who in a network namespace has a port, for a line that says why it is not the proxy's."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Final

from pyambient.errors import PyambientError
from pyambient.netns import Netns

from .processes import holding, named
from .socket_diag import DiagnosisRefused, sockets_from

_UNKNOWN: Final = "somebody"
_PROTOCOLS: Final = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)


def holders(netns: Netns, port: int) -> str:
    """As in "4711 (nginx)"; a process of another namespace may have it, and is not found.

    It never fails: who asks has more to say than that.
    """
    with contextlib.suppress(PyambientError, OSError):
        return _holders(netns, port)
    return _UNKNOWN


def _holders(netns: Netns, port: int) -> str:
    inodes = set(_inodes(netns, port))
    if inodes == {0}:
        return "connections that have just ended"
    return named(dict.fromkeys(process for process, _ in holding(netns, inodes))) or _UNKNOWN


def _inodes(netns: Netns, port: int) -> Iterator[int]:
    """Of the sockets with this port, 0 for what waits in TIME_WAIT.

    Before Linux 6.8 those are missing that are bound, and neither listen nor are connected.
    """
    for protocol in _PROTOCOLS:
        try:
            yield from (each.inode for each in sockets_from(netns, protocol, port))
        except DiagnosisRefused:
            continue
