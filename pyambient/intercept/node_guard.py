"""The second guard, on the node's end of a pod's veth: out of reach for root in the pod.

It cannot see sockets, as a veth takes them off. What it sees is the sign that the pod's own guard
has left on a packet: TCP without it has not passed there. So it drops what was sent past the
pod's guard (PACKET_QDISC_BYPASS, AF_XDP), and all TCP while that one is gone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from pyambient.errors import PyambientError
from pyambient.netns import Netns

from .device_program import DevicePlace, DeviceProgram, Direction
from .egress_guard import sign_of
from .guard_maps import DROPS
from .interface import Pod, Stage, step
from .loader import Constants, load
from .node_hooks import TRACE_MAPS
from .node_pins import existing_map
from .rtnetlink import routes

_VETH: Final = "veth"

_NODE_MAPS: Final = ("dns_pods", DROPS, *TRACE_MAPS)


@functools.cache
def _node() -> Netns:
    """The node's network namespace is the one that this process is in."""
    return Netns.own()


@step
@dataclass(frozen=True, slots=True)
class NodeGuard(DeviceProgram):
    """The guard behind one device of the pod; `index` is its peer's, on the node."""

    kind: ClassVar[str] = "bpf-guard-node"
    stage: ClassVar[Stage] = Stage.GATE
    place: ClassVar[DevicePlace] = DevicePlace("pyamb_guard_node", Direction.INGRESS, rank=1)

    cookie: int
    counts_only: bool = False

    def describe(self) -> str:
        return (
            f"bpf attach {self.place.name} to the ingress of the node's end of {self.device}, "
            f"pinned in {self.bpffs}/pods"
        )

    @contextlib.contextmanager
    def loaded(self, pod: Pod) -> Iterator[int]:
        bpffs = Path(self.bpffs)
        constants = Constants(self.cookie, counts_only=self.counts_only, sign=sign_of(pod))
        with contextlib.ExitStack() as stack:
            shared = {n: stack.enter_context(existing_map(bpffs, n)) for n in _NODE_MAPS}
            objects = stack.enter_context(load("guard_node", constants, shared))
            yield objects.program_fd(self.place.program)

    def _netns(self, pod: Pod) -> Netns:  # noqa: ARG002 - the same for every pod
        return _node()

    def _current_index(self, pod: Pod) -> int:
        index = peer_index(pod.netns, self.device)
        if index is None:
            raise PyambientError(
                f"{self.device} of {pod.netns.name} has no veth peer on the node",
                "leave out --guard-node",
            )
        return index

    def remove_filter(self, netns: Netns) -> None:
        """Only where the device is still there: another may have its index by now."""
        with routes(netns) as kernel:
            found = kernel.pairing(index=self.index)
        if found is not None and found.kind == _VETH:
            DeviceProgram.remove_filter(self, netns)


def peer_index(netns: Netns, device: str) -> int | None:
    """The index, on the node, of the veth whose other end is `device`; None if there is none.

    The node's network namespace is the one that the calling thread is in.
    """
    with routes(netns) as kernel:
        end = kernel.pairing(name=device)
    if end is None or end.kind != _VETH:
        return None
    with Netns.own() as node, routes(node) as kernel:
        peer, known_as = kernel.pairing(index=end.peer), kernel.number_of(netns)
    # An index means little without its namespace: the peer has to name this pod as its own peer's.
    is_ours = peer is not None and (peer.peer, peer.peer_netns) == (end.device, known_as)
    return end.peer if is_ours else None
