"""The guard on a pod's devices: TCP leaves by the proxy, or not at all, and so do DNS queries.

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
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from .device_program import DevicePlace, DeviceProgram, Direction
from .guard_maps import COUNTS, EXISTING, LAST, LET_IN, keep_new, note_existing, opened
from .interface import Pod, Stage, step
from .loader import Constants, LoadedObject, load
from .node_hooks import TRACE_MAPS
from .node_pins import existing_map

_NODE_MAPS: Final = (
    *("proxy_sockets", "captured_socks", "selections", "probes", "pods", "dns_pods"),
    *TRACE_MAPS,
)


@step
@dataclass(frozen=True, slots=True)
class EgressGuard(DeviceProgram):
    """The guard on one device. What is redirected by a program ahead of it never comes here.

    With `counts_only` it drops nothing; `signs` is for the guard on the node.
    """

    kind: ClassVar[str] = "bpf-guard"
    stage: ClassVar[Stage] = Stage.GATE
    place: ClassVar[DevicePlace] = DevicePlace("pyamb_guard", Direction.EGRESS, rank=2)

    cookie: int
    counts_only: bool = False
    signs: bool = False

    @contextlib.contextmanager
    def load(self, pod: Pod) -> Iterator[LoadedObject]:
        bpffs = Path(self.bpffs)
        note_existing(pod, bpffs, look=not self.index)
        constants = Constants(
            netns=self.cookie,
            is_ethernet=self.is_ethernet(pod),
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
