"""What apps can do on this kernel, found by trying."""

from __future__ import annotations

import socket
from typing import Final

from pyambient.model.numbers import PROXY_MARK

from .network import BedPod
from .privileges import Capability

IPPROTO_MPTCP: Final = 262  # linux/in.h


def has_mptcp() -> bool:
    """Whether there are Multipath TCP sockets: CONFIG_MPTCP."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP).close()
    except OSError:
        return False
    return True


def _may_mark() -> bool:
    with socket.socket() as any_socket:
        try:
            any_socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
        except PermissionError:
            return False
    return True


def marking(pod: BedPod) -> list[Capability]:
    """The least that lets an app of `pod` set SO_MARK: CAP_NET_RAW does since Linux 5.17."""
    enough = pod.run(_may_mark, capabilities=[Capability.NET_RAW])
    return [Capability.NET_RAW if enough else Capability.NET_ADMIN]
