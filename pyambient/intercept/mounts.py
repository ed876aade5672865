"""Where this node's cgroup2 and bpffs are, from /proc/self/mountinfo.

A hybrid system mounts cgroup2 beside the version 1 controllers (`/sys/fs/cgroup/unified`), so no
path is taken for granted.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError

MOUNTINFO: Final = Path("/proc/self/mountinfo")
_libc = ctypes.CDLL(None, use_errno=True)


def mount_points(kind: str) -> list[Path]:
    """Where file systems of type `kind` are mounted, in the order of mounting."""
    found = []
    for line in MOUNTINFO.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if rest.split(" ", 1)[0] == kind:
            found.append(Path(_unescaped(fields.split(" ")[4])))
    return found


def _unescaped(text: str) -> str:
    """Mount points come with space, tab, newline and backslash as octal (proc(5))."""
    for character in " \t\n\\":
        text = text.replace(f"\\{ord(character):03o}", character)
    return text


def find_cgroup2_root() -> Path | None:
    """The mount point of cgroup2; None where there is none."""
    return next(iter(mount_points("cgroup2")), None)


def is_on(path: Path, kind: str) -> bool:
    """Whether `path`, or the nearest directory above it that exists, is on such a file system."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    device = existing.stat().st_dev
    return any(p.exists() and p.stat().st_dev == device for p in mount_points(kind))


def ensure_bpffs(directory: Path) -> None:
    """Make `directory` on a bpffs, mounting one at its parent if there is none yet.

    The mount stays: other programs may pin below it by then.
    """
    with _mounted_for(directory):
        directory.mkdir(mode=0o700, exist_ok=True)


def try_bpffs(directory: Path) -> None:
    """Find out whether `ensure_bpffs` would do, beside `directory`: an agent may be using that."""
    with _mounted_for(directory):
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=directory.name).cleanup()


@contextlib.contextmanager
def _mounted_for(directory: Path) -> Iterator[None]:
    try:
        if not is_on(directory, "bpf"):
            _mount_bpffs(directory.parent)
        yield
    except OSError as error:
        raise PyambientError(
            f"there is no BPF file system for {directory}: {error.strerror}",
            f"run 'mount -t bpf bpf {directory.parent}', or use --backend iptables",
        ) from None


def _mount_bpffs(target: Path) -> None:
    if _libc.mount(b"bpf", os.fsencode(target), b"bpf", 0, b"mode=0700"):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))
