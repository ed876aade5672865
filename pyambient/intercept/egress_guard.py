"""The guard on a pod's devices: TCP leaves by the proxy, or not at all.

General theory of operation
---------------------------
A program at each device's egress judges every TCP packet by the socket that sent it (its promise
is in bpf/guard.bpf.c, its limits are in docs/security.md). It is attached when all else is in
place, the gate included: from then on an app's connect is captured and what it accepts comes by
the proxy, so whatever connections the pod has that moment are from before, and are noted then. Not
earlier: one opened between the look and the gate would be neither. A guard that was lost and is
put back keeps to what was noted.

Root in the pod can send past it, or take it away. The guard on the node (`node_guard`) then drops
what does not bear this one's sign.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from .bpf_node import existing_map
from .device_program import DeviceProgram, Direction, Place
from .guard_maps import COUNTS, EXISTING, LAST, LET_IN, keep_new, note_existing, opened
from .interface import Pod, Stage, step
from .loader import Constants, LoadedObject, load

_NODE_MAPS: Final = ("proxy_sockets", "captured_socks", "selections", "probes")
_SIOCGIFHWADDR: Final = 0x8927
_ARPHRD_ETHER: Final = 1


@step
@dataclass(frozen=True, slots=True)
class EgressGuard(DeviceProgram):
    """The guard on one device. What is redirected by a program ahead of it never comes here.

    With `counts_only` it drops nothing; `signs` is for the guard on the node.
    """

    kind: ClassVar[str] = "bpf-guard"
    stage: ClassVar[Stage] = Stage.GATE
    place: ClassVar[Place] = Place("pyamb_guard", Direction.EGRESS, rank=2)

    cookie: int
    counts_only: bool = False
    signs: bool = False

    @contextlib.contextmanager
    def load(self, pod: Pod) -> Iterator[LoadedObject]:
        bpffs = Path(self.bpffs)
        note_existing(pod, bpffs, look=not self.index)
        constants = Constants(
            netns=self.cookie,
            is_ethernet=_is_ethernet(pod, self.device),
            counts_only=self.counts_only,
            sign=sign_of(pod) if self.signs else 0,
        )
        with contextlib.ExitStack() as stack:
            shared = {n: stack.enter_context(existing_map(bpffs, n)) for n in _NODE_MAPS}
            shared |= stack.enter_context(opened(pod, bpffs, EXISTING, LET_IN, COUNTS, LAST))
            loaded = stack.enter_context(load("guard", constants, shared))
            keep_new(pod, bpffs, loaded, shared)
            yield loaded


def sign_of(pod: Pod) -> int:
    """What the pod's guard leaves on a packet for the node's: a number that is never 0.

    Both get it from the pod's uid, which is random and nobody's in the pod to know.
    """
    digest = hashlib.blake2s(pod.uid.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") | 1


def _is_ethernet(pod: Pod, device: str) -> bool:
    """Asked by netdevice(7): decoding all that netlink tells of a device takes a millisecond."""
    request = struct.pack("16s16x", os.fsencode(device))
    with pod.netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFHWADDR, request)
    (kind,) = struct.unpack_from("=H", answer, 16)
    return bool(kind == _ARPHRD_ETHER)
