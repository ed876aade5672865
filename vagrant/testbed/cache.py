"""Folders outside git that are made once, and again when something that goes into them changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import progress
from .errors import BedError

# The largest stage at its worst: a root file system unpacked, beside the image made of it.
_ROOM = 6 << 30
_NO_BUILD = "PYAMBIENT_NO_BUILD"


def root() -> Path:
    """$PYAMBIENT_CACHE/testbed; the variable defaults to ~/.cache/pyambient."""
    base = os.environ.get("PYAMBIENT_CACHE") or "~/.cache/pyambient"
    return Path(base).expanduser() / "testbed"


def digest(*inputs: str | Path) -> str:
    """A short hash of texts and of the contents of files."""
    total = hashlib.sha256()
    for item in inputs:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        total.update(hashlib.sha256(content).digest())
    return total.hexdigest()[:16]


def has(name: str, key: str) -> bool:
    """Whether the stage `name` is there with this key."""
    return (root() / f"{name}-{key}").is_dir()


def forbid_building() -> None:
    """From now on, a stage that is missing is an error."""
    os.environ[_NO_BUILD] = "1"


def folder(name: str, title: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder of the stage `name` with this key; `make(empty folder)` fills it if need be.

    It appears under its name only when complete. Folders of the same stage with other keys are
    removed then: nobody builds them again, and a guest that still runs on one keeps it open.
    """
    done = root() / f"{name}-{key}"
    if done.is_dir():
        return done
    if os.environ.get(_NO_BUILD):
        raise BedError(f"the {title} is not built", "run vagrant/build-box as root")
    with _locked(name):
        if not done.is_dir():
            _make(name, title, done, make)
    return done


def _make(name: str, title: str, done: Path, make: Callable[[Path], None]) -> None:
    _require_room()
    part = done.with_name(f"{name}-part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        with progress.stage(title):
            make(part)
        part.rename(done)
    except OSError as error:
        raise BedError(
            f"{title}: {error}", f"see that {root()} is writable and has room"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for other in root().glob(f"{name}-*"):
        if other != done:
            shutil.rmtree(other, ignore_errors=True)


def _require_room() -> None:
    free = shutil.disk_usage(root()).free
    if free < _ROOM:
        raise BedError(
            f"{root()} has {free >> 20} MiB left, building needs {_ROOM >> 20}",
            "free some disk space or point PYAMBIENT_CACHE elsewhere",
        )


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One builder per stage; who comes second finds the stage made."""
    try:
        root().mkdir(parents=True, exist_ok=True)
        lock = (root() / f"{name}.lock").open("w")
    except OSError as error:
        raise BedError(
            f"{root()}: {error.strerror}", "set PYAMBIENT_CACHE to a writable folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
