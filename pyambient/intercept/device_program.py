"""A BPF program at the tc hook of a device of a pod, as a step.

General theory of operation
---------------------------
tcx (Linux 6.6) attaches by a link, which is pinned and belongs to us alone. Before, the program is
a filter of the device's clsact qdisc (tc-bpf(8)); the qdisc goes with the last filter of ours if
nobody else had made it. Which of the two this kernel takes is found by trying.

The kernel takes a while to attach by tcx: it waits until no CPU is still at the programs from
before (an RCU grace period, several milliseconds). To exchange a link's program it waits for
nothing. So the place can be reserved early, by a program that lets everything pass, while all else
is applied; to apply the step is to pin that link and exchange its program. Until then
nothing but this process holds it.

Several of our programs may sit at one hook, and their order counts. A `rank` says it: with clsact
it is the filter's priority. With tcx the first rank goes ahead of whatever is there, the others to
the end, so the first comes first again when it is attached anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import fcntl
import os
import socket
import struct
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from pyroute2.netlink.exceptions import NetlinkError

from pyambient.netns import Netns

from . import libbpf, lo_filter
from .interface import Pod, Stage
from .kernel_objects import AttachType, Link, program_info
from .node_hooks import PROGRAM_PREFIX
from .node_pins import detach_pinned, pod_directory, uses_pinned_maps
from .rtnetlink import request, routing

_HANDLE: Final = 0x111
_SIOCGIFHWADDR: Final = 0x8927
# ARPHRD_ETHER and ARPHRD_LOOPBACK of linux/if_arp.h.
_LIKE_ETHERNET: Final = (1, 772)
_NO_TCX: Final = frozenset((errno.EINVAL, errno.EOPNOTSUPP))
_SCHED_CLS: Final = 3  # BPF_PROG_TYPE_SCHED_CLS
_BYSTANDER: Final = f"{PROGRAM_PREFIX}bystand"
# r0 = TCX_NEXT (-1); exit
_PASS: Final = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -1, 0x95, 0, 0, 0)
_GONE: Final = frozenset((errno.ENOENT, errno.ENODEV, errno.EINVAL))
_LONGEST_NAME: Final = 15


class Direction(enum.Enum):
    """Which packets of a device; the value is the parent of filters for them (TC_H_MAKE)."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3

    @property
    def tcx(self) -> AttachType:
        return AttachType.TCX_INGRESS if self is Direction.INGRESS else AttachType.TCX_EGRESS


@dataclass(frozen=True, slots=True)
class DevicePlace:
    """Where a program runs, and which of our programs comes first there (rank 1)."""

    program: str
    direction: Direction
    rank: int

    @property
    def name(self) -> str:
        return self.program.removeprefix(PROGRAM_PREFIX)


@dataclass(frozen=True, slots=True)
class DeviceProgram(ABC):
    """One program on one device; `index` and the rest are what `apply` found and did."""

    stage: ClassVar[Stage] = Stage.APPLY
    place: ClassVar[DevicePlace]

    bpffs: str
    device: str
    index: int = field(default=0, compare=False, kw_only=True)
    by_filter: bool = field(default=False, compare=False, kw_only=True)
    made_qdisc: bool = field(default=False, compare=False, kw_only=True)

    @abstractmethod
    def loaded(self, pod: Pod) -> AbstractContextManager[int]:
        """The fd of the program, which shares the maps that it is to share."""

    def describe(self) -> str:
        place = self.place
        return (
            f"bpf attach {place.name} to the {place.direction.name.lower()} of {self.device}, "
            f"pinned in {self.bpffs}/pods"
        )

    def apply(self, pod: Pod) -> Self:
        if self.missing(pod) is None:
            return self
        index = self._current_index(pod)
        held = self._held(pod, index)
        if held is None:
            self.undo(pod)
        try:
            return self._attached(pod, index, held)
        except BaseException:
            if held is None:
                self._pin(pod).unlink(missing_ok=True)
            raise
        finally:
            if held is not None:
                held.close()

    def _attached(self, pod: Pod, index: int, held: Link | None) -> Self:
        with self.loaded(pod) as program:
            if held is not None:
                held.update(program)
            elif not self._link(pod, program, index):
                made = add_filter(self._netns(pod), index, self.place, program)
                return dataclasses.replace(self, index=index, by_filter=True, made_qdisc=made)
        return dataclasses.replace(self, index=index, by_filter=False)

    def reserve(self, pod: Pod) -> None:
        """Take the place by tcx, where this kernel has that, with a program that does nothing.

        The link is in the pod's `places` then.
        """
        pin = self._pin(pod)
        if pin.exists():
            return
        program = _bystander()
        try:
            link = self._attach(pod, program, self._current_index(pod))
        finally:
            os.close(program)
        if link is not None:
            pod.places[pin.name] = link

    def _held(self, pod: Pod, index: int) -> Link | None:
        """The link that holds the place on this very device, whatever runs there; it is pinned."""
        pin = self._pin(pod)
        link = pod.places.pop(pin.name, None)
        if link is None:
            link = Link.open_pinned(pin)
        else:
            link.pin(pin)
        if link is None:
            return None
        if link.info().target == index:
            return link
        link.close()
        return None

    def undo(self, pod: Pod) -> None:
        detach_pinned(self._pin(pod))
        self._pin(pod).unlink(missing_ok=True)
        if self.by_filter and pod.netns.fd >= 0:
            self.remove_filter(self._netns(pod))

    def attached_to(self, pod: Pod) -> int | None:
        """The index of the very device that runs the program now, whatever `apply` had found."""
        link = Link.open_pinned(self._pin(pod))
        if link is not None:
            with link:
                info = link.info()
            return info.target or None if _is(info.program, self.place.program) else None
        try:
            index = self._current_index(pod)
        except OSError:
            return None
        program = self._filter(pod, index)
        return index if program is not None and _is(program, self.place.program) else None

    def missing(self, pod: Pod) -> str | None:
        if self._current_index(pod) != self.index:
            return f"{self.device} is another device now"
        name, program = self.place.name, self._running(pod)
        if program is None or not _is(program, self.place.program):
            return f"no {name} on {self.device}"
        used = uses_pinned_maps(self.bpffs, program)
        return None if used else f"the {name} on {self.device} uses maps that are gone"

    def _running(self, pod: Pod) -> int | None:
        """The id of the program in our place of the device."""
        if self.by_filter:
            return self._filter(pod, self.index)
        link = Link.open_pinned(self._pin(pod))
        if link is None:
            return None
        with link:
            info = link.info()
        return info.program if info.target == self.index else None

    def _filter(self, pod: Pod, index: int) -> int | None:
        egress = self.place.direction is Direction.EGRESS
        return lo_filter.program_at(self._netns(pod), index, self.place.rank, egress=egress)

    def _link(self, pod: Pod, program: int, index: int) -> bool:
        """Attach by tcx, to stay; False where this kernel has none."""
        link = self._attach(pod, program, index)
        if link is None:
            return False
        with link:
            link.pin(self._pin(pod))
        return True

    def _attach(self, pod: Pod, program: int, index: int) -> Link | None:
        first = self.place.rank == 1
        try:
            with self._netns(pod).entered():
                return Link.create(program, index, self.place.direction.tcx, first=first)
        except OSError as error:
            if error.errno in _NO_TCX:
                return None
            raise

    def is_ethernet(self, pod: Pod) -> bool:
        """Whether the device puts an Ethernet header before its packets.

        Asked by netdevice(7): decoding all that netlink tells of a device takes a millisecond.
        """
        question = struct.pack("16s16x", os.fsencode(self.device))
        with pod.netns.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            answer = fcntl.ioctl(any_socket, _SIOCGIFHWADDR, question)
        (kind,) = struct.unpack_from("=H", answer, 16)
        return kind in _LIKE_ETHERNET

    def remove_filter(self, netns: Netns) -> None:
        """Take the filter away, and the qdisc where it was ours."""
        _remove_filter(netns, self.index, self.place)
        if self.made_qdisc and not _has_filters(netns, self.index):
            _remove_qdisc(netns, self.index)

    def _netns(self, pod: Pod) -> Netns:
        """Where the device is."""
        return pod.netns

    def _current_index(self, pod: Pod) -> int:
        with pod.netns.entered():
            return socket.if_nametoindex(self.device)

    def _pin(self, pod: Pod) -> Path:
        device = urllib.parse.quote(self.device, safe="").replace(".", "%2E")
        return pod_directory(Path(self.bpffs), pod.uid) / f"{self.place.name}-{device}"


def _bystander() -> int:
    """A program that lets all pass to whatever comes behind it; its fd."""
    return int(
        libbpf.call(
            "bpf_prog_load", _SCHED_CLS, _BYSTANDER.encode(), b"GPL", _PASS, len(_PASS) // 8, None
        )
    )


def _is(program: int, name: str) -> bool:
    """Whether a program, by its id, has this name, of which the kernel keeps 15 characters."""
    info = program_info(program)
    return info is not None and info.name == name[:_LONGEST_NAME]


def add_filter(netns: Netns, index: int, place: DevicePlace, program: int) -> bool:
    """Attach as a filter of the clsact qdisc; whether the qdisc is ours.

    It is if it had to be made now, and if one of our programs is in it already, which may have
    made it and be the first to leave.
    """
    ours = request(netns, lambda kernel: kernel.tc("add", "clsact", index=index), {errno.EEXIST})
    ours = ours or any(name.startswith(PROGRAM_PREFIX) for name in _all_filters(netns, index))

    def add(kernel: Any) -> None:
        kernel.tc(
            "replace-filter",
            "bpf",
            index=index,
            handle=_HANDLE,
            prio=place.rank,
            parent=place.direction.value,
            fd=program,
            name=place.program,
            direct_action=True,
        )

    try:
        request(netns, add, ())
    except OSError:
        if ours and not _has_filters(netns, index):
            _remove_qdisc(netns, index)
        raise
    return ours


def _remove_filter(netns: Netns, index: int, place: DevicePlace) -> None:
    where = {"handle": _HANDLE, "prio": place.rank, "parent": place.direction.value}
    request(netns, lambda kernel: kernel.tc("del-filter", "bpf", index=index, **where), _GONE)


def _remove_qdisc(netns: Netns, index: int) -> None:
    request(netns, lambda kernel: kernel.tc("del", "clsact", index=index), _GONE)


def _has_filters(netns: Netns, index: int) -> bool:
    return any(True for _ in _all_filters(netns, index))


def _all_filters(netns: Netns, index: int) -> Iterator[str]:
    for direction in Direction:
        yield from _filters(netns, index, direction)


def _filters(netns: Netns, index: int, direction: Direction) -> tuple[str, ...]:
    """The names of the filters on a device; "" for one that is no BPF program."""
    with routing(netns) as kernel, contextlib.suppress(NetlinkError):
        names = map(_name_of, list(kernel.get_filters(index=index, parent=direction.value)))
        return tuple(name for name in names if name is not None)
    return ()


def _name_of(message: Any) -> str | None:
    """The kernel lists each priority once more than it has filters, without options."""
    options = message.get_attr("TCA_OPTIONS")
    if options is None:
        return None
    return str(options.get_attr("TCA_BPF_NAME") or "") if hasattr(options, "get_attr") else ""
