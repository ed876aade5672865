"""What lets an app set SO_MARK, found by trying: Linux 5.17 began to let CAP_NET_RAW do it."""

from __future__ import annotations

import socket

from pyambient.model.numbers import PROXY_MARK

from .network import BedPod
from .privileges import Capability


def _may_mark() -> bool:
    with socket.socket() as any_socket:
        try:
            any_socket.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
        except PermissionError:
            return False
    return True


def marking(pod: BedPod) -> list[Capability]:
    """The least that lets an app of `pod` set marks: what containers have, or what that lacks."""
    enough = pod.run(_may_mark, capabilities=[Capability.NET_RAW])
    return [Capability.NET_RAW if enough else Capability.NET_ADMIN]
