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
import enum
import errno
import fcntl
import functools
import os
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyambient.errors import PyambientError

from .foreign_hooks import refuse_foreign
from .kernel_objects import AttachType, Link, Map, program_info
from .loader import Constants
from .mounts import ensure_bpffs
from .node_objects import NodeObjects, ahead
from .original_dns import RESOLVERS_MAP

_LOCK_SECONDS: Final = 10.0
# Whatever decides about a pod tells it by these (bpf/trace.h).
TRACE_MAPS: Final = ("trace_readers", "trace_rings")
MAPS: Final = (
    *("pods", "addresses", "devices", "listeners", "workers"),
    *("proxy_sockets", "captured_socks", "upstreams", "selections"),
    *("dns_pods", RESOLVERS_MAP),
    *("probe_sockets", "probes", "moved_ports"),
    *TRACE_MAPS,
)
REDIRECT_MAPS: Final = ("redirected", "forwarded", "forwarded_dns", "split_dns")
_ALL_MAPS: Final = MAPS + REDIRECT_MAPS
PROGRAM_PREFIX: Final = "pyamb_"


class Place(enum.Enum):
    """A cgroup that hooks are on: that of all apps, the proxy's, that of what probes pods."""

    APPS = enum.auto()
    PROXY = enum.auto()
    PROBES = enum.auto()


@dataclass(frozen=True, slots=True)
class Hook:
    """A program of the node, and the cgroup it belongs on."""

    source: str
    program: str
    attach_type: AttachType
    place: Place = Place.APPS

    @property
    def name(self) -> str:
        return self.program.removeprefix(PROGRAM_PREFIX)

    @property
    def pin(self) -> str:
        return f"proxy_{self.name}" if self.place is Place.PROXY else self.name


_PROXY_SOCKETS: Final = (
    Hook("proxy_socket", "pyamb_sock", AttachType.SOCK_CREATE, Place.PROXY),
    Hook("proxy_socket", "pyamb_sockops", AttachType.SOCK_OPS, Place.PROXY),
)
_PROBES: Final = (
    Hook("probe", "pyamb_probe4", AttachType.CONNECT4, Place.PROBES),
    Hook("probe", "pyamb_probe6", AttachType.CONNECT6, Place.PROBES),
    Hook("probe", "pyamb_probing", AttachType.SOCK_OPS, Place.PROBES),
)
# The proxy must be known before connects are judged.
HOOKS: Final = (
    *_PROXY_SOCKETS,
    Hook("bind", "pyamb_bind4", AttachType.BIND4),
    Hook("bind", "pyamb_bind6", AttachType.BIND6),
    Hook("connect", "pyamb_connect4", AttachType.CONNECT4),
    Hook("connect", "pyamb_connect6", AttachType.CONNECT6),
    Hook("dns", "pyamb_dns_conn4", AttachType.CONNECT4),
    Hook("dns", "pyamb_dns_conn6", AttachType.CONNECT6),
    Hook("dns", "pyamb_dns_send4", AttachType.UDP4_SENDMSG),
    Hook("dns", "pyamb_dns_send6", AttachType.UDP6_SENDMSG),
    Hook("dns", "pyamb_dns_recv4", AttachType.UDP4_RECVMSG),
    Hook("dns", "pyamb_dns_recv6", AttachType.UDP6_RECVMSG),
    Hook("dns", "pyamb_dns_peer4", AttachType.GETPEERNAME4),
    Hook("dns", "pyamb_dns_peer6", AttachType.GETPEERNAME6),
    *_PROBES,
)
# Where no hook sees the apps: the proxy's own connects alone.
PROXY_HOOKS: Final = (
    *_PROXY_SOCKETS,
    Hook("connect", "pyamb_connect4", AttachType.CONNECT4, Place.PROXY),
    Hook("connect", "pyamb_connect6", AttachType.CONNECT6, Place.PROXY),
    *_PROBES,
)
_ALL_HOOKS: Final = tuple(dict.fromkeys((*HOOKS, *PROXY_HOOKS)))


@dataclass(frozen=True, slots=True)
class ProgramSet:
    """What one backend needs of the node.

    `sources` are programs that each pod loads for itself, and whose maps all pods share.
    """

    hooks: tuple[Hook, ...]
    maps: tuple[str, ...]
    sources: tuple[str, ...] = ()


BPF: Final = ProgramSet(HOOKS, MAPS)
_NOT_OF_TC: Final = frozenset((RESOLVERS_MAP,))
TC: Final = ProgramSet(
    PROXY_HOOKS, tuple(name for name in _ALL_MAPS if name not in _NOT_OF_TC), ("redirect",)
)


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
            _remove(pod_directory(self.bpffs, uid))
            self._remove_unclaimed()

    def missing(self, uid: str) -> str | None:
        """What is not as `claim` left it, or None."""
        if not pod_directory(self.bpffs, uid).is_dir():
            return "the pod's directory is gone from bpffs"
        needed = self.needed
        absent = [name for name in needed.maps if not (self.directory / name).exists()]
        pinned = _pinned_identifiers(self.directory)
        try:
            for hook in needed.hooks:
                attached = self._is_attached(self.directory, hook)
                if not attached or not _uses(self.directory, hook, pinned):
                    absent.append(hook.pin)
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
        lost = [name for name in self.needed.maps if not (directory / name).exists()]
        if repair or lost:
            _pin_used_maps(directory)
            lost = [name for name in lost if not (directory / name).exists()]
        hooks = self.needed.hooks
        absent = [hook for hook in hooks if not self._is_attached(directory, hook)]
        if repair:
            pinned = _pinned_identifiers(directory)
            absent = [h for h in hooks if h in absent or not _uses(directory, h, pinned)]
        if absent:
            refuse_foreign(self.cgroup, PROGRAM_PREFIX)
            self.proxy_cgroup.mkdir(exist_ok=True)
        directory.mkdir(exist_ok=True)
        if absent or lost:
            others = self.needed.sources if lost else ()
            self._load(directory, absent, others, constants, is_first=is_first)
        if directory != self.directory:
            directory.rename(self.directory)

    def load_ahead(self, constants: Constants) -> None:
        """Have everything loaded before the first pod claims it, unless pods have done so."""
        if not self._is_claimed():
            sources = self._sources(self.needed.hooks, self.needed.sources)
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
        """Attach these hooks, and make the maps of theirs and of `others` that are not there.

        What is loaded ahead is for the first pod: what others have lost is made anew.
        """
        sources = self._sources(hooks, others)
        with contextlib.ExitStack() as stack:
            maps = {m.name: stack.enter_context(m) for m in _pinned_maps(directory)}
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

    def _is_attached(self, directory: Path, hook: Hook) -> bool:
        """False if it has to be attached (again); an error if it serves another cgroup."""
        link = Link.open_pinned(directory / hook.pin)
        if link is None:
            return False
        with link:
            target = link.info().target
        if target == _identifier(self._cgroup_of(hook)):
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
            for hook in _ALL_HOOKS:
                detach_pinned(directory / hook.pin)
        for directory in (self._building, self.directory, self.bpffs / "pods", self.bpffs):
            _remove(directory)

    def _remove_unclaimed(self) -> None:
        if self._is_claimed():
            return
        self._remove_pins()
        with contextlib.suppress(OSError):
            self.proxy_cgroup.rmdir()  # busy while a proxy runs in it, whose it then is

    def __repr__(self) -> str:
        return f"<NodePrograms {self.bpffs} on {self.cgroup}>"


def pod_directory(bpffs: Path, uid: str) -> Path:
    """Where a pod's pins are; bpffs reserves names with a dot (ENOENT or EPERM)."""
    return bpffs / "pods" / urllib.parse.quote(uid, safe="").replace(".", "%2E")


def detach_pinned(pin: Path) -> None:
    """Let a pinned link's program run no more; that nothing is pinned there is no error.

    Now: a link that just loses its last pin is freed some time later.
    """
    link = Link.open_pinned(pin)
    if link is not None:
        with link:
            link.detach()


def node_map(bpffs: Path, name: str) -> Map | None:
    """A map of the node, or None where no pod is enrolled."""
    return Map.open_pinned(bpffs / "node" / name)


def existing_map(bpffs: Path, name: str) -> Map:
    """A map of the node; PyambientError where it is gone."""
    found = node_map(bpffs, name)
    if found is None:
        raise PyambientError(f"the BPF map {bpffs}/node/{name} is gone", "enrol the pod again")
    return found


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


def _pinned_maps(directory: Path) -> Iterator[Map]:
    for name in _ALL_MAPS:
        pinned = Map.open_pinned(directory / name)
        if pinned is not None:
            yield pinned


def _pinned_identifiers(directory: Path) -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        return {m.name: stack.enter_context(m).identifier for m in _pinned_maps(directory)}


def _program_of(directory: Path, hook: Hook) -> int:
    """The id of the program that runs for a hook; 0 where it is not attached."""
    link = Link.open_pinned(directory / hook.pin)
    if link is None:
        return 0
    with link:
        return link.info().program


def uses_pinned_maps(bpffs: Path, program: int) -> bool:
    """Whether a program works with the maps of the node that are pinned now, not with others."""
    for name, identifier in _node_maps_of(program):
        pinned = node_map(bpffs, name)
        if pinned is None:
            return False
        with pinned:
            if pinned.identifier != identifier:
                return False
    return True


@functools.lru_cache(maxsize=4096)
def _node_maps_of(program: int) -> tuple[tuple[str, int], ...]:
    """Name and id of the node's maps that a program uses, which are always the same ones."""
    info = program_info(program)
    found = []
    for identifier in info.maps if info else ():
        with Map.open_by_identifier(identifier) as held:
            if held.name in _ALL_MAPS:
                found.append((held.name, identifier))
    return tuple(found)


def _uses(directory: Path, hook: Hook, pinned: dict[str, int]) -> bool:
    """Whether a hook's program works with the maps that are pinned, not with others."""
    program = _program_of(directory, hook)
    return all(pinned.get(name) == identifier for name, identifier in _node_maps_of(program))


def _pin_used_maps(directory: Path) -> None:
    """Pin maps again whose pins somebody removed or replaced: the attached programs have them.

    A map made anew would not know the listeners that the proxy has already.
    """
    done: set[str] = set()
    for hook in _ALL_HOOKS:
        for name, identifier in _node_maps_of(_program_of(directory, hook)):
            if name not in done:
                done.add(name)
                with Map.open_by_identifier(identifier) as held:
                    _pin_instead(held, directory / name)


def _pin_instead(used: Map, path: Path) -> None:
    pinned = Map.open_pinned(path)
    if pinned is not None:
        with pinned:
            if pinned.identifier == used.identifier:
                return
    path.unlink(missing_ok=True)
    used.pin(path)


def _remove(directory: Path) -> None:
    """Unpin what is in a directory and remove it; one that is not there or not empty is left."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for pin in directory.iterdir():
            if not pin.is_dir():
                pin.unlink()
    try:
        directory.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


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
