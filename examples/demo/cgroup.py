"""A cgroup2 sub-tree for the demo alone.

Hooks attached to it see the sockets of processes in it and no others, so the demo may attach what
it likes without touching the rest of the machine.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from pyambient.errors import PyambientError

from .patience import patience

_PATIENCE = patience(5.0)


def mount_point() -> Path:
    """Where cgroup2 is mounted (proc(5), /proc/PID/mountinfo)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split()[4])
    raise PyambientError(
        "no cgroup2 is mounted", "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified"
    )


@contextlib.contextmanager
def subtree(name: str) -> Iterator[Path]:
    """Make a sub-tree for the block; what still runs in it at the end is killed."""
    top = mount_point() / f"{name}-{os.getpid()}"
    top.mkdir()
    try:
        yield top
    finally:
        _remove(top)


def _remove(top: Path) -> None:
    """Kill all processes below `top` and remove it, leaves first."""
    deadline = time.monotonic() + _PATIENCE
    folders = sorted((Path(path) for path, _, _ in os.walk(top)), reverse=True)
    while folders:
        _kill(folders[0])
        try:
            folders[0].rmdir()
            folders.pop(0)
        except OSError:
            if time.monotonic() > deadline:
                raise PyambientError(
                    f"{folders[0]} cannot be removed", "see its cgroup.procs"
                ) from None
            time.sleep(0.02)


def _kill(folder: Path) -> None:
    """One by one: cgroup.kill came with Linux 5.14."""
    for pid in (folder / "cgroup.procs").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
