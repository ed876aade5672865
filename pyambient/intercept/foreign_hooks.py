"""Other tools' programs that have a say in where apps connect to: what they are, and where.

A call passes the hooks of the app's own cgroup, then those of its ancestors, and on one cgroup in
the order of their attachment. What another tool already has on ours, or has below, comes before our
hooks, which see the destination that it has chosen; with DNS its answers come from a resolver that
the app did not ask. What it has above, or attaches later, comes after them: it changes where a
captured connection goes, and that is what the proxy is told.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError

from .kernel_objects import AttachType, attached_programs, program_info

_ALLOW_MULTI: Final = 2  # BPF_F_ALLOW_MULTI
_HOOKS: Final = (
    *(AttachType.CONNECT4, AttachType.CONNECT6),
    *(AttachType.UDP4_SENDMSG, AttachType.UDP6_SENDMSG),
)


@dataclass(frozen=True, slots=True)
class ForeignHook:
    """A program of another tool; `shares`: the cgroups below may have programs besides it."""

    program: str
    identifier: int
    hook: AttachType
    cgroup: Path
    shares: bool

    def __str__(self) -> str:
        return f"{self.program} (id {self.identifier}, {self.hook.name.lower()} of {self.cgroup})"


def foreign_hooks(cgroup: Path, ours: str) -> list[ForeignHook]:
    """All on the cgroup, its ancestors and what is below; `ours` is what our names begin with."""
    return [
        found
        for directory in (*_ancestors(cgroup), cgroup, *_below(cgroup))
        for found in _of(directory)
        if not found.program.startswith(ours)
    ]


def refuse_foreign(cgroup: Path, ours: str) -> None:
    """PyambientError for one that comes before ours, or that ours would turn off."""
    found = [
        hook
        for directory in (*_ancestors(cgroup), cgroup)
        for hook in _of(directory)
        if not hook.program.startswith(ours) and is_in_the_way(hook, cgroup)
    ]
    if found:
        names = ", ".join(map(str, found))
        raise PyambientError(
            f"another tool's program handles the connects of {cgroup}: {names}",
            "turn it off (Cilium: socketLB.hostNamespaceOnly=true), or use --backend iptables",
        )


def is_in_the_way(found: ForeignHook, cgroup: Path) -> bool:
    """Whether ours cannot be on the cgroup as long as this one is there."""
    above = found.cgroup in cgroup.parents
    return (above and not found.shares) or found.cgroup == cgroup


def _ancestors(cgroup: Path) -> Iterator[Path]:
    """Those that the mount shows."""
    device = cgroup.stat().st_dev
    return (parent for parent in cgroup.parents if parent.stat().st_dev == device)


def _below(cgroup: Path) -> Iterator[Path]:
    for directory, _, _ in os.walk(cgroup):
        if directory != str(cgroup):
            yield Path(directory)


def _of(cgroup: Path, hooks: Iterable[AttachType] = _HOOKS) -> Iterator[ForeignHook]:
    try:
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:  # it was removed meanwhile
        return
    try:
        for hook in hooks:
            identifiers, flags = attached_programs(fd, hook)
            for identifier in identifiers:
                program = program_info(identifier)
                if program is not None:
                    shares = bool(flags & _ALLOW_MULTI)
                    yield ForeignHook(program.name, identifier, hook, cgroup, shares)
    finally:
        os.close(fd)
