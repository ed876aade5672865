"""The mesh file: read in one piece, bounded, and read again when it changes.

The format is `localschema`'s. A file that cannot be used is a `MeshFileError` and changes nothing:
what was read before stays in force.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import trio

from pyambient.model.numbers import DEFAULT_TRUST_DOMAIN
from pyambient.observe.logs import get_logger

from .localschema import LocalConfig, mesh_file
from .yamlreader import MeshFileError, compose

if TYPE_CHECKING:
    from .view import MeshView

__all__ = [
    "MAX_BYTES",
    "LocalConfig",
    "MeshFileError",
    "Stamp",
    "follow",
    "parse",
    "read",
    "refresh",
]

MAX_BYTES = 10 << 20
_log = get_logger("mesh")


class Stamp(NamedTuple):
    """What changes whenever a file does; a rename over it changes the inode."""

    device: int
    inode: int
    size: int
    modified_ns: int


def parse(source: str, name: str, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> LocalConfig:
    """The mesh that the YAML text `source` describes; errors call it `name`."""
    return mesh_file(trust_domain)(compose(source, name))


def read(path: Path, trust_domain: str = DEFAULT_TRUST_DOMAIN) -> tuple[LocalConfig, Stamp]:
    """The mesh in a file of at most MAX_BYTES, and the stamp of what was read."""
    try:
        content, stamp = _content(path)
        source = content.decode()
    except OSError as error:
        what = f"{path}: cannot be read: {error.strerror}"
        raise MeshFileError(what, "check the path and its permissions") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise MeshFileError(f"{path}:{line}: not UTF-8", "save the file as UTF-8") from None
    return parse(source, str(path), trust_domain), stamp


def _content(path: Path) -> tuple[bytes, Stamp]:
    """The bytes of a regular file; opening anything else might block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise MeshFileError(f"{path}: is not a regular file", "give the path of a YAML file")
    with path.open("rb") as file:
        stamp = _stamp(os.fstat(file.fileno()))
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise MeshFileError(
            f"{path}: larger than {MAX_BYTES >> 20} MiB", "take out what this node does not need"
        )
    return content, stamp


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


async def follow(path: Path, view: MeshView, interval: float = 1.0) -> None:
    """Load the file into `view` whenever it changes, forever; looks every `interval` seconds."""
    seen = view.stamp
    while True:
        await trio.sleep(interval)
        seen = await refresh(path, view, seen)


async def refresh(path: Path, view: MeshView, seen: Stamp | None) -> Stamp | None:
    """Load the file if it is not what was `seen`, None for no file; returns what is seen now.

    A file that is bad or gone leaves the view as it is, and says so once. Reading happens in a
    thread: a large file takes seconds, and connections must not wait for it.
    """
    found = _look(path)
    if found == seen:
        return seen
    if found is None:
        _log.warning("the mesh file is gone, what it said stays in force", file=str(path))
        return None
    try:
        config, found = await trio.to_thread.run_sync(read, path, view.trust_domain)
    except MeshFileError as error:
        _log.error("the mesh file is not usable, what was loaded stays in force", error=str(error))
        return found
    view.use(config, str(path), found)
    _log.info("the mesh file was loaded again", file=str(path), content=str(config))
    return found


def _look(path: Path) -> Stamp | None:
    try:
        return _stamp(path.stat())
    except OSError:
        return None
