"""One JSON file per enrolled pod: what was done to it, so that any process can undo it.

General theory of operation
---------------------------
A record is written before the first step it names is applied, and again whenever what is known
about the pod changes. A crash at any point therefore leaves a record that names at least what was
done: undoing a step that was never applied is no error, leaving one behind would be. Writing is a
temporary file and a rename, so a reader sees one whole record or the one before. There is no
fsync: the directory is on a tmpfs and dies with the kernel state it describes.

Inode numbers of network namespaces are reused, their cookies are not (Linux 5.14). A record holds
both, and a namespace is the recorded one only if all it can be asked for is equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyambient.errors import PyambientError, UnsupportedFeature
from pyambient.intercept.interface import Step, from_record, to_record, values_of
from pyambient.intercept.options import DEFAULTS, CaptureOptions
from pyambient.model.ports import WELL_KNOWN, Ports
from pyambient.model.workload import PodRef
from pyambient.netns import Netns

_VERSION: Final = 1
_UID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
# 10,000 CIDRs a direction, in the options and as rules of iptables, before and after a change.
_SIZE_LIMIT: Final = 16 << 20


class State(enum.Enum):
    """Where in its enrolment a pod is."""

    ENROLLING = "enrolling"
    ENROLLED = "enrolled"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class NetnsRef:
    """A network namespace as it can be found again: where it was, and what it is.

    `cookie` is None where the kernel does not tell it.
    """

    path: str
    device: int
    inode: int
    cookie: int | None

    @classmethod
    def of(cls, netns: Netns, path: str) -> NetnsRef:
        return cls(path, netns.device, netns.inode, cookie_of(netns))

    def matches(self, netns: Netns) -> bool:
        """Whether `netns` is the recorded one, not one that was given its inode number."""
        return netns.key == (self.device, self.inode) and (
            self.cookie is None or cookie_of(netns) == self.cookie
        )

    @property
    def label(self) -> str:
        """For people, and as good for `Netns.open`: a name, `pid:N`, or else the path."""
        named = re.fullmatch(r"(?:/var)?/run/netns/([^/]+)", self.path)
        process = re.fullmatch(r"/proc/(\d+)/ns/net", self.path)
        return named[1] if named else f"pid:{process[1]}" if process else self.path


def cookie_of(netns: Netns) -> int | None:
    try:
        return netns.cookie()
    except UnsupportedFeature:
        return None


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one pod's enrolment; `steps` are in the order of their application.

    `leaving` are those of a former backend that connections from its time still need, `existing`
    the cookies of connections from before the enrolment, `ports` those on which the proxy listens.
    """

    pod: PodRef
    netns: NetnsRef
    backend: str
    state: State
    steps: tuple[Step, ...]
    addresses: tuple[str, ...] = ()
    cgroup: str | None = None
    options: CaptureOptions = DEFAULTS
    leaving: tuple[Step, ...] = ()
    existing: tuple[int, ...] = ()
    ports: Ports = WELL_KNOWN

    def changed(self, **fields: Any) -> Record:
        return dataclasses.replace(self, **fields)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "pod": values_of(self.pod),
            "netns": values_of(self.netns),
            "backend": self.backend,
            "state": self.state.value,
            "steps": to_record(self.steps),
            "addresses": list(self.addresses),
            "cgroup": self.cgroup,
            "options": self.options.to_json(),
            "leaving": to_record(self.leaving),
            "existing": list(self.existing),
            "ports": list(self.ports),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Record:
        """PyambientError, KeyError, TypeError or ValueError for what is no record."""
        # Importing the backends is what makes their steps known.
        import pyambient.intercept.choose  # noqa: F401, PLC0415 - not for --help

        if fields["version"] != _VERSION:
            raise PyambientError(f"record version {fields['version']}", "upgrade pyambient")
        return cls(
            PodRef(**fields["pod"]),
            NetnsRef(**fields["netns"]),
            str(fields["backend"]),
            State(fields["state"]),
            from_record(fields["steps"]),
            tuple(fields["addresses"]),
            fields["cgroup"],
            CaptureOptions.from_json(fields["options"]),
            from_record(fields["leaving"]),
            tuple(map(int, fields["existing"])),
            Ports(*map(int, fields["ports"])),
        )


class RecordStore:
    """The records in one directory, a file each, named by the pod's uid."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, record: Record) -> None:
        """Replace the pod's record; an OSError leaves the one before."""
        path = self._path(record.pod.uid)
        temporary = path.with_suffix(".tmp")
        text = json.dumps(record.to_json())  # indented, it would not be C that encodes it
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.rename(path)

    def remove(self, uid: str) -> None:
        self._path(uid).unlink(missing_ok=True)

    def read(self, uid: str) -> Record:
        return _load(self._path(uid))

    def all(self) -> list[Record]:
        """Every record, sorted by pod; PyambientError names the first that cannot be read."""
        return sorted(filter(None, map(_load_listed, self._files())), key=_order)

    def readable(self) -> tuple[list[Record], list[PyambientError]]:
        """The records that can be read, sorted, and what is wrong with the others."""
        records: list[Record] = []
        errors: list[PyambientError] = []
        for path in self._files():
            try:
                record = _load_listed(path)
            except PyambientError as error:
                errors.append(error)
            else:
                records += [record] if record else []
        return sorted(records, key=_order), errors

    def sweep(self) -> None:
        """Remove what writes that never finished have left."""
        for path in self.directory.glob("*.tmp"):
            path.unlink(missing_ok=True)

    def _files(self) -> Iterator[Path]:
        with contextlib.suppress(FileNotFoundError):
            yield from sorted(self.directory.glob("*.json"))

    def _path(self, uid: str) -> Path:
        if not _UID.fullmatch(uid):
            raise PyambientError(f"{uid!r} cannot be the uid of a pod")
        return self.directory / f"{uid}.json"

    def __repr__(self) -> str:
        return f"<RecordStore {self.directory}>"


def _load_listed(path: Path) -> Record | None:
    """A record whose file was there a moment ago; None if its pod was freed meanwhile."""
    try:
        return _load(path)
    except PyambientError:
        if path.exists():
            raise
        return None


def _load(path: Path) -> Record:
    try:
        with path.open(encoding="utf-8") as file:
            return Record.from_json(json.loads(file.read(_SIZE_LIMIT)))
    except PyambientError as error:
        raise PyambientError(f"{path}: {error.what}", error.then) from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise PyambientError(
            f"{path} is not a record of pyambient's ({type(error).__name__}: {error})",
            "move it away; what it described may still be in its network namespace",
        ) from None


def _order(record: Record) -> tuple[str, str, str]:
    return (record.pod.namespace, record.pod.name, record.pod.uid)
