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
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Self

from . import guard_maps
from .device_program import DevicePlace, DeviceProgram, Direction
from .entry import Choice, device_entry
from .existing import existing_connections
from .guard_maps import DROPS, EXISTING
from .interface import Pod, Stage, step
from .node_hooks import GUARD
from .node_pins import existing_map


@step
@dataclass(frozen=True, slots=True)
class GuardedPod:
    """What the guards of all devices of a pod share: its places in maps of the node.

    `older` is how many connections from before are in there, None as long as nobody has looked.
    Who has lost them must not look again: what is there by then may have passed a guard that was
    gone.
    """

    kind: ClassVar[str] = "bpf-guarded"
    stage: ClassVar[Stage] = Stage.GATE

    bpffs: str
    cookie: int
    older: int | None = field(default=None, compare=False)

    def describe(self) -> str:
        return f"bpf maps {EXISTING}, {DROPS} += this network namespace"

    def apply(self, pod: Pod) -> Self:
        bpffs, cookie = self.bpffs, self.cookie
        guard_maps.count_drops(bpffs, cookie)
        if self.older is not None:
            return self
        connections = existing_connections(pod.netns)
        if connections:
            guard_maps.note_older(bpffs, cookie, connections)
        return dataclasses.replace(self, older=len(connections))

    def undo(self, pod: Pod) -> None:  # noqa: ARG002 - the cookie is never used again
        guard_maps.forget(self.bpffs, self.cookie)

    def missing(self, pod: Pod) -> str | None:  # noqa: ARG002 - the maps are the node's
        there = guard_maps.has_place(self.bpffs, DROPS, self.cookie)
        return None if there else f"not in the BPF map {DROPS}"


@step
@dataclass(frozen=True, slots=True)
class EgressGuard(DeviceProgram):
    """The guard of one device. What is redirected by a program ahead of it never comes here.

    With `counts_only` it drops nothing; `signs` is for the guard on the node.
    """

    kind: ClassVar[str] = "bpf-guard"
    stage: ClassVar[Stage] = Stage.GATE
    place: ClassVar[DevicePlace] = DevicePlace("pyamb_guard", Direction.EGRESS, rank=2)

    cookie: int
    counts_only: bool = False
    signs: bool = False

    @contextlib.contextmanager
    def loaded(self, pod: Pod) -> Iterator[int]:
        choices = Choice(0)
        if self.is_ethernet(pod):
            choices |= Choice.IS_ETHERNET
        if self.counts_only:
            choices |= Choice.COUNTS_ONLY
        sign = sign_of(pod) if self.signs else 0
        with (
            existing_map(self.bpffs, GUARD.map) as program,
            device_entry(GUARD.program, program, self.cookie, choices, sign) as entry,
        ):
            yield entry.fd


def sign_of(pod: Pod) -> int:
    """What the pod's guard leaves on a packet for the node's: a number that is never 0.

    Both get it from the pod's uid, which is random and nobody's in the pod to know.
    """
    digest = hashlib.blake2s(pod.uid.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") | 1
