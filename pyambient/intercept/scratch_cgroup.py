"""Cgroups made for the moment, in which nobody lives whom a trial could disturb."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyambient.errors import PyambientError

from .kernel_objects import AttachType, Link


@dataclass(frozen=True, slots=True)
class ScratchCgroup:
    """An open directory of cgroup2; what is linked to it goes with it."""

    path: Path
    fd: int

    def link(self, program: int, attach_type: AttachType) -> Link:
        return Link.create(program, self.fd, attach_type)


@contextlib.contextmanager
def scratch_cgroup(parent: Path | None) -> Iterator[ScratchCgroup]:
    """An empty cgroup below `parent`, removed at the end; it must be empty again by then."""
    if parent is None:
        raise PyambientError("cgroup2 is not mounted", "run 'mount -t cgroup2 none DIR'")
    path = Path(tempfile.mkdtemp(prefix="pyambient-scratch-", dir=parent))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield ScratchCgroup(path, fd)
        finally:
            os.close(fd)
    finally:
        path.rmdir()
