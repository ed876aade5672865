"""Which processes are in a network namespace, and in which cgroup2 directory each of them is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from pyambient.netns import Netns

_NAMED_AT_MOST: Final = 5


class Process(NamedTuple):
    """`cgroup` is the directory as mounted here; None for one that no mount here shows."""

    pid: int
    command: str
    cgroup: Path | None

    def __str__(self) -> str:
        return f"{self.pid} ({self.command})"


def processes_in(netns: Netns) -> Iterator[Process]:
    """The processes whose main thread is in the namespace."""
    mounts = list(_cgroup2_mounts())
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208 - there may be thousands
        with contextlib.suppress(OSError):  # it ended meanwhile
            status = os.stat(f"/proc/{name}/ns/net")  # noqa: PTH116 - as above
            if (status.st_dev, status.st_ino) == netns.key:
                directory = Path("/proc", name)
                yield Process(int(name), _command(directory), _cgroup(directory, mounts))


def _command(directory: Path) -> str:
    """What the process calls itself, any bytes, as a phrase of one line."""
    name = (directory / "comm").read_bytes().removesuffix(b"\n").decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in name)


def holding(netns: Netns, inodes: Collection[int]) -> Iterator[tuple[Process, int]]:
    """Which processes of the namespace have which of these sockets; none for what others hold."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    for process in processes_in(netns):
        for link in frozenset(_descriptors(process.pid)) & wanted.keys():
            yield process, wanted[link]


def _descriptors(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it ended meanwhile
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(fd.readlink())


def named(processes: Iterable[Process]) -> str:
    """For a line: a few of them, and how many more there are."""
    names = [str(process) for process in processes]
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def members(cgroup: Path) -> set[int]:
    """The processes in a cgroup and below it."""
    pids: set[int] = set()
    for directory in sub_tree(cgroup):
        with contextlib.suppress(OSError):
            pids.update(map(int, (directory / "cgroup.procs").read_text("ascii").split()))
    return pids


def sub_tree(cgroup: Path) -> Iterator[Path]:
    """A cgroup and those below it; to look for files by a pattern would be to look at dozens."""
    return (Path(directory) for directory, _, _ in os.walk(cgroup))


def _cgroup2_mounts() -> Iterator[tuple[Path, Path]]:
    """What of the hierarchy each mount of cgroup2 shows, and where (proc_pid_mountinfo(5))."""
    for line in _lines(Path("/proc/self/mountinfo")):
        fields, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            _, _, _, root, mount_point, *_ = fields.split(" ")
            yield Path(root), Path(mount_point)


def _cgroup(directory: Path, mounts: list[tuple[Path, Path]]) -> Path | None:
    lines = _lines(directory / "cgroup")
    paths = [Path(line.removeprefix("0::")) for line in lines if line.startswith("0::")]
    for path in paths:
        for root, mount_point in mounts:
            if path.is_relative_to(root) and ".." not in path.parts:
                return mount_point / path.relative_to(root)
    return None


def _lines(file: Path) -> list[str]:
    """A directory's name is any bytes, without a line feed: the kernel refuses or escapes that."""
    return file.read_text(errors="surrogateescape").split("\n")
