"""The BPF programs and maps that all enrolled pods of a node share.

General theory of operation
---------------------------
Below the bpffs directory of the site lie two directories:

    node/   pins of the maps, and of one link per hook of a cgroup
    pods/   a directory per enrolled pod (its uid, escaped), holding the pin of its sk_lookup link

The pins are the state; no process has to stay alive for it, and none keeps a copy. A pod's
directory is its claim on `node/`: the last claim that goes takes the programs along.

`claim` completes what it finds: nothing at all (the first build happens in `building/`, which is
renamed when it is whole), or a link whose cgroup was removed and made again. What no pod claims is
the rest of somebody who was killed, and goes first. Two processes that enrol at once take turns
through a lock on the directory above, which nobody removes. The half-built programs of a moment
do nothing: the map `pods`, by which they know whom to serve, is filled by a pod's very last step.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError

from .foreign_hooks import refuse_foreign
from .kernel_objects import Link
from .loader import Constants
from .mounts import ensure_bpffs
from .node_hooks import ALL_HOOKS, BPF, PROGRAM_PREFIX, SHARED, Hook, Place, ProgramSet
from .node_objects import NodeObjects, ahead
from .node_pins import (
    detach_pinned,
    pin_used_maps,
    pinned_identifiers,
    pinned_maps,
    pod_directory,
    remove,
    uses,
)

_LOCK_SECONDS: Final = 10.0


class NodePrograms:
    """The shared programs of one bpffs directory and one cgroup."""

    def __init__(
        self,
        bpffs: Path,
        cgroup: Path,
        probe_cgroup: Path | None = None,
        needed: ProgramSet = BPF,
    ) -> None:
        self.bpffs = bpffs
        self.cgroup = cgroup
        self.needed = needed
        self.proxy_cgroup = cgroup / "pyambient-proxy"
        self.cgroups = {
            Place.APPS: cgroup,
            Place.PROXY: self.proxy_cgroup,
            Place.PROBES: probe_cgroup or cgroup,
        }
        self.directory = bpffs / "node"
        self._building = bpffs / "building"

    def claim(self, uid: str, constants: Constants) -> None:
        """Have everything loaded, attached and pinned, and note that the pod `uid` needs it.

        PyambientError if the programs serve another cgroup, or if somebody else's program
        already decides about this cgroup's connections.
        """
        if not self._is_claimed():
            ensure_bpffs(self.bpffs)
        with self._locked():
            is_first = not self._is_claimed()
            if is_first:
                self._remove_pins()
                ensure_bpffs(self.bpffs)
            try:
                repair = pod_directory(self.bpffs, uid).is_dir()
                self._complete(constants, repair=repair, is_first=is_first)
                pod_directory(self.bpffs, uid).mkdir(parents=True, exist_ok=True)
            except BaseException:
                self._remove_unclaimed()
                raise

    def release(self, uid: str) -> None:
        """Drop the pod's claim; the last one takes programs, maps and directories along."""
        if not self.bpffs.is_dir():
            return
        with self._locked():
            remove(pod_directory(self.bpffs, uid))
            self._remove_unclaimed()

    def missing(self, uid: str) -> str | None:
        """What is not as `claim` left it, or None."""
        if not pod_directory(self.bpffs, uid).is_dir():
            return "the pod's directory is gone from bpffs"
        needed = self.needed
        absent = self._lost_maps(self.directory)
        pinned, targets = pinned_identifiers(self.directory), self._identifiers()
        try:
            for hook in needed.hooks:
                attached = self._is_attached(self.directory, hook, targets)
                if not attached or not uses(self.directory, hook, pinned):
                    absent.append(hook.pin)
            absent += [s.program for s in SHARED if not uses(self.directory, s, pinned)]
        except PyambientError as error:
            return error.what
        return f"not pinned or not attached: {' '.join(absent)}" if absent else None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.bpffs.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(fd)
            yield
        finally:
            os.close(fd)

    def _complete(self, constants: Constants, *, repair: bool, is_first: bool) -> None:
        directory = self.directory if self.directory.exists() else self._building
        lost = self._lost_maps(directory)
        if repair or lost:
            pin_used_maps(directory)
            lost = self._lost_maps(directory)
        hooks, targets = self.needed.hooks, self._identifiers()
        absent = [hook for hook in hooks if not self._is_attached(directory, hook, targets)]
        others: tuple[str, ...] = ()
        if repair or lost:
            pinned = pinned_identifiers(directory)
            others = tuple(s.source for s in SHARED if not uses(directory, s, pinned))
            others += self.needed.sources if lost else ()
            absent = [h for h in hooks if h in absent or not uses(directory, h, pinned)]
        if absent:
            refuse_foreign(self.cgroup, PROGRAM_PREFIX)
            self.proxy_cgroup.mkdir(exist_ok=True)
        directory.mkdir(exist_ok=True)
        if absent or others:
            self._load(directory, absent, others, constants, is_first=is_first)
        if directory != self.directory:
            directory.rename(self.directory)

    def _lost_maps(self, directory: Path) -> list[str]:
        pinned: set[str] = set()
        with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
            pinned.update(entry.name for entry in entries)
        return [name for name in self.needed.maps if name not in pinned]

    def load_ahead(self, constants: Constants) -> None:
        """Have everything loaded before the first pod claims it, unless pods have done so."""
        if not self._is_claimed():
            others = (*(shared.source for shared in SHARED), *self.needed.sources)
            sources = self._sources(self.needed.hooks, others)
            ahead.load(self.bpffs, sources, constants)

    def _load(
        self,
        directory: Path,
        hooks: Iterable[Hook],
        others: Iterable[str],
        constants: Constants,
        *,
        is_first: bool,
    ) -> None:
        """Attach these hooks, have `others` loaded, and make maps of theirs that are not there.

        What is loaded ahead is for the first pod: what others have lost is made anew.
        """
        sources = self._sources(hooks, others)
        with contextlib.ExitStack() as stack:
            maps = {m.name: stack.enter_context(m) for m in pinned_maps(directory)}
            objects = ahead.find(self.bpffs, sources, constants) if is_first else None
            if objects is None:
                objects = stack.enter_context(NodeObjects(sources, constants, maps))
            objects.pin_maps(directory)
            for hook in hooks:
                self._link(directory, hook, objects.program_fd(hook.source, hook.program))

    @staticmethod
    def _sources(hooks: Iterable[Hook], others: Iterable[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*(hook.source for hook in hooks), *others)))

    def _link(self, directory: Path, hook: Hook, program: int) -> None:
        target = os.open(self._cgroup_of(hook), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with Link.create(program, target, hook.attach_type) as link:
                (directory / hook.pin).unlink(missing_ok=True)
                link.pin(directory / hook.pin)
        except OSError as error:
            raise PyambientError(
                f"cannot attach {hook.program} to {self._cgroup_of(hook)}: {error.strerror}",
                "run 'pyambient check'",
            ) from None
        finally:
            os.close(target)

    def _cgroup_of(self, hook: Hook) -> Path:
        return self.cgroups[hook.place]

    def _identifiers(self) -> dict[Place, int]:
        return {place: _identifier(cgroup) for place, cgroup in self.cgroups.items()}

    def _is_attached(self, directory: Path, hook: Hook, targets: Mapping[Place, int]) -> bool:
        """False if it has to be attached (again); an error if it serves another cgroup."""
        link = Link.open_pinned(f"{directory}/{hook.pin}")
        if link is None:
            return False
        with link:
            target = link.info().target
        if target == targets[hook.place]:
            return True
        other = _cgroup_path(self.cgroup, target)
        if other is None:
            return False
        raise PyambientError(
            f"the BPF programs in {self.bpffs} serve {other}, not {self._cgroup_of(hook)}",
            "give the same --cgroup as before, or run 'pyambient unenroll --all' first",
        )

    def _is_claimed(self) -> bool:
        pods = self.bpffs / "pods"
        return pods.is_dir() and any(pods.iterdir())

    def _remove_pins(self) -> None:
        for directory in (self._building, self.directory):
            for hook in ALL_HOOKS:
                detach_pinned(directory / hook.pin)
        for directory in (self._building, self.directory, self.bpffs / "pods", self.bpffs):
            remove(directory)

    def _remove_unclaimed(self) -> None:
        if self._is_claimed():
            return
        self._remove_pins()
        with contextlib.suppress(OSError):
            self.proxy_cgroup.rmdir()  # busy while a proxy runs in it, whose it then is

    def __repr__(self) -> str:
        return f"<NodePrograms {self.bpffs} on {self.cgroup}>"


def _lock(fd: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise PyambientError(
                    "another pyambient has been loading BPF programs for too long",
                    "see what hangs with 'ps', end it and try again",
                ) from None
            time.sleep(0.005)
        else:
            return


def _identifier(cgroup: Path) -> int:
    """A cgroup's id is the inode number of its directory (Linux 5.5, 64 bit)."""
    return cgroup.stat().st_ino if cgroup.exists() else -1


def _cgroup_path(near: Path, identifier: int) -> str | None:
    """The path of the cgroup with this id, looked for in the whole tree; None if it is gone."""
    device = near.stat().st_dev
    top = [p for p in (near, *near.parents) if p.stat().st_dev == device][-1]
    for directory, _, _ in os.walk(top):
        if _identifier(Path(directory)) == identifier:
            return directory
    return None
