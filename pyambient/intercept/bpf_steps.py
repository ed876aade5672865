"""What the `bpf` backend adds for a pod, as steps.

All a step needs to undo itself is in the step: the pod's network namespace may be gone by then,
its cookie is never used again.
"""

from __future__ import annotations

import dataclasses
import enum
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from pyambient.model.address import packed_ip
from pyambient.model.numbers import DNS_SLOT_COUNT
from pyambient.model.ports import Ports

from . import lo_filter
from .bpf_node import NodePrograms
from .entry import lookup_entry
from .interface import Pod, Stage, Step, step
from .kernel_objects import AttachType, Link, program_info
from .loader import Constants, load
from .node_hooks import BPF, LOOKUP, Place, ProgramSet
from .node_pins import detach_pinned, existing_map, node_map, pod_directory, uses_pinned_maps
from .original_dns import RESOLVERS_MAP, slot_key

_LINK_PIN = "sk_lookup"


@step
@dataclass(frozen=True, slots=True)
class NodeStep:
    """The programs of the node, shared by its pods; the last pod takes them along."""

    kind: ClassVar[str] = "bpf-node"
    stage: ClassVar[Stage] = Stage.PREPARE
    of_node: ClassVar[bool] = True
    needed: ClassVar[ProgramSet] = BPF

    bpffs: str
    cgroup: str
    has_ingress_ifindex: bool
    has_set_retval: bool
    probe_cgroup: str
    node: int

    def describe(self) -> str:
        names = {p: [h.name for h in self.needed.hooks if h.place is p] for p in Place}
        placed = (f"{' '.join(n)} to {self._node.cgroups[p]}" for p, n in names.items() if n)
        return f"bpf attach {', '.join(placed)}, pinned in {self._node.directory}"

    def apply(self, pod: Pod) -> Self:
        constants = Constants(0, self.node, self.has_ingress_ifindex, self.has_set_retval)
        self._node.claim(pod.uid, constants)
        return self

    def takes_over(self, earlier: Step) -> bool:
        """What only the other backend needs stays until no pod is left."""
        return isinstance(earlier, NodeStep)

    def undo(self, pod: Pod) -> None:
        self._node.release(pod.uid)

    def missing(self, pod: Pod) -> str | None:
        return self._node.missing(pod.uid)

    @property
    def _node(self) -> NodePrograms:
        cgroups = (Path(self.cgroup), Path(self.probe_cgroup))
        return NodePrograms(Path(self.bpffs), *cgroups, self.needed)


@dataclass(frozen=True, slots=True)
class MapEntry(ABC):
    """An entry of a map of the node, keyed by the cookie of the pod's network namespace."""

    bpffs: str
    cookie: int

    map_name: ClassVar[str]

    def apply(self, pod: Pod) -> Self:
        with existing_map(self.bpffs, self.map_name) as entries:
            entries.put(self._key(), self._value(pod))
        return self

    def undo(self, pod: Pod) -> None:  # noqa: ARG002 - the entry is found by its key alone
        entries = node_map(self.bpffs, self.map_name)
        if entries is not None:
            with entries:
                entries.delete(self._key())

    def missing(self, pod: Pod) -> str | None:
        entries = node_map(self.bpffs, self.map_name)
        if entries is None:
            return f"the BPF map {self.map_name} is gone"
        with entries:
            found = entries.get(self._key())
        return None if found == self._value(pod) else f"not in the BPF map {self.map_name}"

    def _key(self) -> bytes:
        return struct.pack("=Q", self.cookie)

    @abstractmethod
    def _value(self, pod: Pod) -> bytes:
        """What the entry holds."""


@step
@dataclass(frozen=True, slots=True)
class MovedPort(MapEntry):
    """One of two ports that have changed places in the pod: what the other one is to the hooks."""

    kind: ClassVar[str] = "bpf-moved-port"
    stage: ClassVar[Stage] = Stage.PREPARE
    map_name: ClassVar[str] = "moved_ports"

    port: int
    other: int

    def describe(self) -> str:
        return f"bpf map moved_ports += {self.port}, which is {self.other} here"

    def _key(self) -> bytes:
        return struct.pack("=QII", self.cookie, self.port, 0)

    def _value(self, pod: Pod) -> bytes:  # noqa: ARG002 - the step says it all
        return struct.pack("=I", self.other)


def moved_ports(bpffs: str, cookie: int, ports: Ports) -> Iterator[MovedPort]:
    """What tells the hooks that some of the proxy's ports are others; the listeners come after."""
    for well_known, port in ports.moved.items():
        yield MovedPort(bpffs, cookie, well_known, port)
        yield MovedPort(bpffs, cookie, port, well_known)


@step
@dataclass(frozen=True, slots=True)
class OwnAddress(MapEntry):
    """An address of the pod: what tells its inbound, outbound and inner connections apart."""

    kind: ClassVar[str] = "bpf-address"
    stage: ClassVar[Stage] = Stage.APPLY
    map_name: ClassVar[str] = "addresses"

    ip: str

    def describe(self) -> str:
        return f"bpf map addresses += {self.ip}"

    def _key(self) -> bytes:
        return struct.pack("=Q16s", self.cookie, packed_ip(self.ip))

    def _value(self, pod: Pod) -> bytes:  # noqa: ARG002 - the key says it all
        return b"\1"


@step
@dataclass(frozen=True, slots=True)
class CapturedDevice(MapEntry):
    """A device that has its route for captured sockets; a socket bound to another is refused.

    No routing rule could do that: where a device-bound lookup fails, IPv4 takes the destination
    for on-link and sends. `source` and `metric` are the route's: a route that is exchanged takes
    the entry along for the moment without one. `index` is what the device had at `apply`.
    """

    kind: ClassVar[str] = "bpf-device"
    stage: ClassVar[Stage] = Stage.APPLY
    map_name: ClassVar[str] = "devices"

    ipv6: bool
    device: str
    source: str | None
    metric: int
    index: int = field(default=0, compare=False)

    def describe(self) -> str:
        return f"bpf map devices += {self.device} for {'IPv6' if self.ipv6 else 'IPv4'}"

    def observed(self, pod: Pod) -> Self:
        """With the index, so that it need not be noted device by device."""
        return self if self.index else dataclasses.replace(self, index=self._current_index(pod))

    def apply(self, pod: Pod) -> Self:
        current = self._current_index(pod)
        if self.index == current:
            return MapEntry.apply(self, pod)
        self.undo(pod)
        return MapEntry.apply(dataclasses.replace(self, index=current), pod)

    def missing(self, pod: Pod) -> str | None:
        if self._current_index(pod) != self.index:
            return f"{self.device} is another device now"
        return MapEntry.missing(self, pod)

    def _current_index(self, pod: Pod) -> int:
        with pod.netns.entered():
            return socket.if_nametoindex(self.device)

    def _key(self) -> bytes:
        family = socket.AF_INET6 if self.ipv6 else socket.AF_INET
        return struct.pack("=QII", self.cookie, self.index, family)

    def _value(self, pod: Pod) -> bytes:  # noqa: ARG002 - the key says it all
        return b"\1"


class CapturedBy(enum.IntEnum):
    """BY_HOOKS and BY_DEVICES of bpf/maps.h."""

    HOOKS = 1
    DEVICES = 2


@step
@dataclass(frozen=True, slots=True)
class DnsGate(MapEntry):
    """From here on the pod's DNS is captured, too."""

    kind: ClassVar[str] = "bpf-dns-gate"
    stage: ClassVar[Stage] = Stage.GATE
    map_name: ClassVar[str] = "dns_pods"
    by: ClassVar[CapturedBy] = CapturedBy.HOOKS

    def describe(self) -> str:
        return f"bpf map {self.map_name} += this network namespace, by {self.by.name.lower()}"

    def takes_over(self, earlier: Step) -> bool:
        return isinstance(earlier, DnsGate)

    def _value(self, pod: Pod) -> bytes:  # noqa: ARG002 - of a namespace there is nothing to add
        return bytes((self.by,))


@step
@dataclass(frozen=True, slots=True)
class DnsSlots:
    """The pod's slots for resolvers: the hooks fill them, un-enrolment empties them.

    That is the very last, as answers that the pod awaits while it is released need them.
    """

    kind: ClassVar[str] = "bpf-dns-slots"
    stage: ClassVar[Stage] = Stage.APPLY

    bpffs: str
    cookie: int

    def describe(self) -> str:
        return f"bpf map {RESOLVERS_MAP}: up to {DNS_SLOT_COUNT} of this network namespace"

    def apply(self, pod: Pod) -> Self:  # noqa: ARG002 - nothing to add
        return self

    def undo(self, pod: Pod) -> None:  # noqa: ARG002 - the cookie is never used again
        entries = node_map(self.bpffs, RESOLVERS_MAP)
        if entries is not None:
            with entries:
                for number in range(DNS_SLOT_COUNT):
                    entries.delete(slot_key(self.cookie, number))

    def missing(self, pod: Pod) -> str | None:  # noqa: ARG002 - it is one map for all
        entries = node_map(self.bpffs, RESOLVERS_MAP)
        if entries is None:
            return f"the BPF map {RESOLVERS_MAP} is gone"
        entries.close()
        return None


@step
@dataclass(frozen=True, slots=True)
class Gate(MapEntry):
    """From here on the pod's connects are captured and the proxy's ports are the proxy's."""

    kind: ClassVar[str] = "bpf-gate"
    stage: ClassVar[Stage] = Stage.GATE
    map_name: ClassVar[str] = "pods"
    by: ClassVar[CapturedBy] = CapturedBy.HOOKS

    def describe(self) -> str:
        return f"bpf map {self.map_name} += this network namespace, by {self.by.name.lower()}"

    def takes_over(self, earlier: Step) -> bool:
        return isinstance(earlier, Gate)

    def _value(self, pod: Pod) -> bytes:
        return struct.pack("=II", pod.netns.inode, self.by)


@step
@dataclass(frozen=True, slots=True)
class LoopbackNote:
    """The filter on lo that tells sk_lookup what came in there, before Linux 5.17.

    Without it sk_lookup drops what the proxy sends to the app. `qdisc_added` tells that the place
    for filters is ours as well.
    """

    kind: ClassVar[str] = "tc-note"
    stage: ClassVar[Stage] = Stage.STEER

    bpffs: str
    cookie: int
    qdisc_added: bool | None = field(default=None, compare=False)

    def describe(self) -> str:
        return f"tc filter add dev lo ingress bpf direct-action, notes in {self.bpffs}/node"

    def observed(self, pod: Pod) -> Self:
        if self.qdisc_added is not None:
            return self
        return dataclasses.replace(self, qdisc_added=not lo_filter.has_qdisc(pod.netns))

    def apply(self, pod: Pod) -> Self:
        observed = self.observed(pod)
        if self.missing(pod) is not None:
            try:
                self._attach(pod)
            except BaseException:
                observed.undo(pod)
                raise
        return observed

    def _attach(self, pod: Pod) -> None:
        constants = Constants(netns=self.cookie)
        with (
            existing_map(self.bpffs, "notes") as notes,
            load("note", constants, {notes.name: notes}) as loaded,
        ):
            lo_filter.attach(pod.netns, loaded.program_fd("pyamb_note"))

    def undo(self, pod: Pod) -> None:
        lo_filter.detach(pod.netns)
        if self.qdisc_added:
            lo_filter.remove_qdisc(pod.netns)

    def missing(self, pod: Pod) -> str | None:
        identifier = lo_filter.attached(pod.netns)
        program = program_info(identifier) if identifier else None
        if program is None:
            return "the filter on lo is gone"
        notes = node_map(self.bpffs, "notes")
        if notes is None:
            return "the notes of the filter on lo are gone"
        with notes:
            shared = notes.identifier in program.maps
        return None if shared else "another filter is on lo"


@step
@dataclass(frozen=True, slots=True)
class SkLookup:
    """The pod's entry to the program that hands new connections to the proxy."""

    kind: ClassVar[str] = "bpf-sk-lookup"
    stage: ClassVar[Stage] = Stage.STEER

    bpffs: str
    cookie: int

    def describe(self) -> str:
        return f"bpf attach sk_lookup to this network namespace, pinned in {self.bpffs}/pods"

    def apply(self, pod: Pod) -> Self:
        if self.missing(pod) is None:
            return self
        name, bpffs = LOOKUP.program, self.bpffs
        with (
            existing_map(bpffs, LOOKUP.map) as program,
            existing_map(bpffs, "entered") as entered,
            lookup_entry(name, program, entered, self.cookie) as entry,
            Link.create(entry.fd, pod.netns.fd, AttachType.SK_LOOKUP) as link,
        ):
            self._pin(pod).unlink(missing_ok=True)
            link.pin(self._pin(pod))
        return self

    def undo(self, pod: Pod) -> None:
        detach_pinned(self._pin(pod))
        self._pin(pod).unlink(missing_ok=True)

    def missing(self, pod: Pod) -> str | None:
        link = Link.open_pinned(self._pin(pod))
        if link is None:
            return "the sk_lookup link is gone"
        with link:
            info = link.info()
        if info.target != pod.netns.inode:
            return "the sk_lookup link has lost its namespace"
        is_whole = uses_pinned_maps(self.bpffs, info.program)
        return None if is_whole else "sk_lookup uses maps that are gone"

    def _pin(self, pod: Pod) -> Path:
        return pod_directory(Path(self.bpffs), pod.uid) / _LINK_PIN
