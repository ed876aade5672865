"""A cgroup2 sub-tree of this test session: what the BPF hooks of a test are attached to."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PREFIX = "pyambient-tests-"


def cgroup2_mount() -> Path:
    """Where this machine's cgroup2 is mounted; the test fails if it is nowhere."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            return Path(fields.split()[4])
    pytest.fail("network tests need cgroup2: mount -t cgroup2 none DIR", pytrace=False)


class CgroupTree:
    """The session's directory, with the child `apps` for what the pods run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.apps = path / "apps"
        self.proxy = path / "pyambient-proxy"

    @classmethod
    def create(cls) -> CgroupTree:
        top = cgroup2_mount()
        cls.sweep(top)
        tree = cls(top / f"{_PREFIX}{os.getpid()}")
        tree.apps.mkdir(parents=True)
        return tree

    @classmethod
    def sweep(cls, top: Path) -> None:
        """Remove the empty trees of sessions that are dead and could not do it themselves."""
        for directory in top.glob(f"{_PREFIX}*"):
            if not Path("/proc", directory.name.removeprefix(_PREFIX)).exists():
                with contextlib.suppress(OSError):
                    for path in cls(directory).directories():
                        path.rmdir()

    def pids(self) -> list[int]:
        """Everything that runs in the tree now."""
        return [pid for directory in self.directories() for pid in _members(directory)]

    def directories(self) -> list[Path]:
        """The tree's own and all below it, deepest first."""
        return [Path(top) for top, _, _ in os.walk(self.path, topdown=False)]

    def kill(self) -> None:
        """End what runs in the tree, by pid, and wait until it is gone; parents do the reaping."""
        deadline = time.monotonic() + 10
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self!r}: {pids} did not end")
            time.sleep(0.01)

    def remove(self) -> None:
        self.kill()
        for directory in self.directories():
            directory.rmdir()

    def __repr__(self) -> str:
        return f"<CgroupTree {self.path}>"


def _members(directory: Path) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError):
        yield from map(int, (directory / "cgroup.procs").read_text().split())
