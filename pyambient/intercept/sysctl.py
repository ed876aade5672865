"""Sysctls of a pod, each restored to what it was.

/proc/sys/net shows the network namespace of the thread that opens the file, so a sysctl of the
pod is the file opened inside `Netns.entered()`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from pyambient.errors import PyambientError
from pyambient.model.numbers import RESERVED_PORTS
from pyambient.model.ports import Ports
from pyambient.netns import Netns

from .interface import Pod, Stage, step

RESERVED = "net.ipv4.ip_local_reserved_ports"


@functools.cache
def path_of(name: str) -> Path:
    """The file of a sysctl, for whoever is in the namespace that it is about."""
    return Path("/proc/sys", *name.split("."))


def read(netns: Netns, name: str) -> str | None:
    """The value of the sysctl in the namespace; None if this kernel or namespace lacks it."""
    path = path_of(name)
    with netns.entered():
        try:
            return path.read_text("ascii").strip()
        except FileNotFoundError:
            return None


def _write(netns: Netns, name: str, value: str) -> None:
    with netns.entered():
        path_of(name).write_text(f"{value}\n", "ascii")


def _read_existing(pod: Pod, name: str) -> str:
    value = read(pod.netns, name)
    if value is None:
        raise PyambientError(
            f"there is no sysctl {name} in {pod.netns.name}",
            "see 'pyambient check' for a backend that this kernel can do",
        )
    return value


@step
@dataclass(frozen=True, slots=True)
class Sysctl:
    """A sysctl with a value of ours; `previous` is what it goes back to."""

    kind: ClassVar[str] = "sysctl"
    stage: ClassVar[Stage] = Stage.APPLY

    name: str
    value: str
    previous: str | None = field(default=None, compare=False)

    def describe(self) -> str:
        return f"sysctl -w {self.name}={self.value}"

    def observed(self, pod: Pod) -> Self:
        current = _read_existing(pod, self.name)
        return self if self.previous is not None else dataclasses.replace(self, previous=current)

    def apply(self, pod: Pod) -> Self:
        observed = self.observed(pod)
        if read(pod.netns, self.name) != self.value:
            _write(pod.netns, self.name, self.value)
        return observed

    def undo(self, pod: Pod) -> None:
        """Restore the previous value, unless somebody has changed ours since."""
        if self.previous not in (None, self.value) and read(pod.netns, self.name) == self.value:
            _write(pod.netns, self.name, self.previous)

    def missing(self, pod: Pod) -> str | None:
        current = read(pod.netns, self.name)
        return None if current == self.value else f"{self.name} is {current}"


@step
@dataclass(frozen=True, slots=True)
class ReservedPorts:
    """Our ports, never handed out as source ports; `added` are those that were not so before."""

    kind: ClassVar[str] = "reserved-ports"
    stage: ClassVar[Stage] = Stage.PREPARE

    ports: tuple[int, ...] = RESERVED_PORTS
    added: tuple[int, ...] = field(default=(), compare=False)

    def describe(self) -> str:
        return f"sysctl -w {RESERVED}+={','.join(map(str, self.ports))}"

    def observed(self, pod: Pod) -> Self:
        absent = set(self.ports) - _parse_ports(_read_existing(pod, RESERVED))
        added = tuple(sorted(absent | set(self.added)))
        return self if added == self.added else dataclasses.replace(self, added=added)

    def apply(self, pod: Pod) -> Self:
        observed = self.observed(pod)
        current = _parse_ports(read(pod.netns, RESERVED) or "")
        if not current.issuperset(self.ports):
            _write(pod.netns, RESERVED, _format_ports(current.union(self.ports)))
        return observed

    def undo(self, pod: Pod) -> None:
        current = _parse_ports(read(pod.netns, RESERVED) or "")
        if current.intersection(self.added):
            _write(pod.netns, RESERVED, _format_ports(current.difference(self.added)))

    def missing(self, pod: Pod) -> str | None:
        absent = set(self.ports) - _parse_ports(read(pod.netns, RESERVED) or "")
        return f"not reserved: {_format_ports(absent)}" if absent else None


def reserved(ports: Ports) -> Iterator[ReservedPorts]:
    """The well-known ports, and what stands for some of them in this pod."""
    yield ReservedPorts()
    if ports.moved:
        yield ReservedPorts(tuple(ports.moved.values()))


def _parse_ports(text: str) -> set[int]:
    """The ports of the kernel's list, such as `15001,20000-20009`."""
    ports: set[int] = set()
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        ports.update(range(int(first), int(last or first) + 1))
    return ports


def _format_ports(ports: Iterable[int]) -> str:
    return ",".join(map(str, sorted(ports)))
