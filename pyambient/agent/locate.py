"""Finding a recorded network namespace again, and telling whether it is still anybody's.

A namespace lives as long as something refers to it, and that may be just us: the agent's handle,
the proxy's listeners. So "is it gone" cannot be asked of the kernel. It is gone for its owner when
it is no longer where it was found and no process is in it. Another one may be in its place.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pyambient.errors import UsageError
from pyambient.netns import Netns

from .records import NetnsRef, Record


def path_of(netns: str) -> str:
    """What `Netns.open` takes as an absolute path, good for another process and a later day."""
    if netns.startswith("pid:"):
        return f"/proc/{netns[4:]}/ns/net"
    if netns.startswith("fd:"):
        return f"/proc/{os.getpid()}/fd/{netns[3:]}"
    return os.path.normpath(Path("/run/netns", netns) if "/" not in netns else Path.cwd() / netns)


def find(ref: NetnsRef) -> Netns | None:
    """The recorded namespace, opened: where it was, else through a process that is in it."""
    for path in _places(ref):
        with contextlib.suppress(UsageError):
            netns = Netns.open(path)
            if ref.matches(netns):
                netns.name = ref.label
                return netns
            netns.close()
    return None


def in_use(ref: NetnsRef) -> bool:
    """Whether the namespace is still at its path, or has a process in it."""
    return next(_places(ref), None) is not None


def is_replaced(ref: NetnsRef) -> bool:
    """Whether what it was enrolled as is another namespace's now; a pid is nobody's name."""
    found = _key(ref.path)
    return found not in (None, (ref.device, ref.inode)) and not ref.path.startswith("/proc/")


def record_of(records: Iterable[Record], netns: str) -> Record:
    """The record of the namespace that `netns` means; UsageError if it is not enrolled.

    A namespace that is gone still counts by the path it was enrolled as, unless another one that
    is enrolled has taken its place.
    """
    candidates = list(records)
    path = path_of(netns)
    key = _key(path)
    for record in candidates:
        if key == (record.netns.device, record.netns.inode):
            return record
    for record in candidates:
        if record.netns.path == path:
            return record
    Netns.open(netns).close()
    raise UsageError(f"{netns} is not enrolled", "see what is with 'pyambient status'")


def refuse_enrolled(records: Iterable[Record], netns: Netns) -> None:
    """UsageError if one of the records is of this namespace."""
    for record in records:
        if netns.key == (record.netns.device, record.netns.inode):
            label = record.netns.label
            raise UsageError(
                f"{label} is {record.state.value} already, as {record.pod}",
                f"run 'pyambient unenroll {label}' first",
            )


def processes(key: tuple[int, int]) -> Iterator[int]:
    """The pids of the processes in the namespace with this (st_dev, st_ino)."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _key(f"/proc/{entry.name}/ns/net") == key:
            yield int(entry.name)


def _places(ref: NetnsRef) -> Iterator[str]:
    key = (ref.device, ref.inode)
    if _key(ref.path) == key:
        yield ref.path
    for pid in processes(key):
        yield f"/proc/{pid}/ns/net"


def _key(path: str) -> tuple[int, int] | None:
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino)
