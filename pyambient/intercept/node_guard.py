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
from typing import Any, ClassVar

from pyroute2.netlink.exceptions import NetlinkError

from pyambient.errors import PyambientError
from pyambient.netns import Netns

from .bpf_node import existing_map
from .device_program import DevicePlace, DeviceProgram, Direction
from .egress_guard import sign_of
from .guard_maps import COUNTS, LAST, keep_new, opened
from .interface import Pod, Stage, step
from .loader import Constants, LoadedObject, load
from .rtnetlink import routing


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
    def load(self, pod: Pod) -> Iterator[LoadedObject]:
        bpffs = Path(self.bpffs)
        # The peer of a veth is one, so it has an Ethernet header.
        constants = Constants(
            self.cookie, is_ethernet=True, counts_only=self.counts_only, sign=sign_of(pod)
        )
        with (
            existing_map(bpffs, "dns_pods") as dns_pods,
            opened(pod, bpffs, COUNTS, LAST) as own,
            load("guard_node", constants, shared := {"dns_pods": dns_pods, **own}) as loaded,
        ):
            keep_new(pod, bpffs, loaded, shared)
            yield loaded

    def reserve(self, pod: Pod) -> None:
        """Nothing: to find the device takes as long."""

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
        with routing(netns) as kernel:
            kinds = [kind_of(link) for link in kernel.get_links() if link["index"] == self.index]
        if kinds == ["veth"]:
            DeviceProgram.remove_filter(self, netns)


def peer_index(netns: Netns, device: str) -> int | None:
    """The index, on the node, of the veth whose other end is `device`; None if there is none.

    The node's network namespace is the one that the calling thread is in.
    """
    with routing(netns) as kernel:
        try:
            (link,) = kernel.link("get", ifname=device)
        except NetlinkError:
            return None
    index = link.get_attr("IFLA_LINK")
    if kind_of(link) != "veth" or not index:
        return None
    with Netns.own() as node, routing(node) as kernel:
        try:
            (peer,) = kernel.link("get", index=index)
        except NetlinkError:
            return None
        known_as = kernel.get_netnsid(fd=netns.fd)["nsid"]
    # An index means little without its namespace: the peer has to name this pod as its own peer's.
    ends = (peer.get_attr("IFLA_LINK"), peer.get_attr("IFLA_LINK_NETNSID"))
    return int(index) if ends == (link["index"], known_as) else None


def kind_of(link: Any) -> str:
    info = link.get_attr("IFLA_LINKINFO")
    return "" if info is None else str(info.get_attr("IFLA_INFO_KIND"))
