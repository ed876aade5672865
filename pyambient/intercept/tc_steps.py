"""What the `tc` backend adds for a pod, as steps, beside those that it shares with `bpf`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from .bpf_steps import CapturedBy, DnsGate, Gate, NodeStep
from .device_program import DevicePlace, DeviceProgram, Direction
from .interface import Pod, step
from .loader import Constants, load
from .node_hooks import TC, TRACE_MAPS, ProgramSet
from .node_pins import existing_map

_SHARED: Final = (
    *("listeners", "workers", "pods", "selections"),
    *("proxy_sockets", "captured_socks", "forwarded"),
    *("dns_pods", "forwarded_dns", "split_dns", "moved_ports"),
    *TRACE_MAPS,
)


@step
@dataclass(frozen=True, slots=True)
class ProxyStep(NodeStep):
    """The programs that know the proxy and its listeners, and the maps that pods share."""

    kind: ClassVar[str] = "tc-node"
    needed: ClassVar[ProgramSet] = TC


@dataclass(frozen=True, slots=True)
class _Redirecting(DeviceProgram):
    """A program of redirect.bpf.c on one device."""

    cookie: int

    @contextlib.contextmanager
    def loaded(self, pod: Pod) -> Iterator[int]:
        constants = Constants(self.cookie, is_ethernet=self.is_ethernet(pod))
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(existing_map(self.bpffs, n)) for n in _SHARED]
            shared = {found.name: found for found in opened}
            objects = stack.enter_context(load("redirect", constants, shared))
            yield objects.program_fd(self.place.program)


@step
@dataclass(frozen=True, slots=True)
class Redirect(_Redirecting):
    """What turns captured packets round at a device; the guard sees what it lets pass."""

    kind: ClassVar[str] = "tc-redirect"
    place: ClassVar[DevicePlace] = DevicePlace("pyamb_redirect", Direction.EGRESS, rank=1)


@step
@dataclass(frozen=True, slots=True)
class Arrival(_Redirecting):
    """What takes them in at lo. Its rank leaves the first place to the notes of `bpf`."""

    kind: ClassVar[str] = "tc-arrival"
    place: ClassVar[DevicePlace] = DevicePlace("pyamb_arrival", Direction.INGRESS, rank=2)


@step
@dataclass(frozen=True, slots=True)
class RedirectDnsGate(DnsGate):
    """From here on its devices turn the pod's DNS round, too."""

    kind: ClassVar[str] = "tc-dns-gate"
    by: ClassVar[CapturedBy] = CapturedBy.DEVICES


@step
@dataclass(frozen=True, slots=True)
class RedirectGate(Gate):
    """From here on the pod's new connections are turned round."""

    kind: ClassVar[str] = "tc-gate"
    by: ClassVar[CapturedBy] = CapturedBy.DEVICES
