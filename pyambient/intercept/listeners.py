"""The proxy's sockets of a pod, made known by hand where the programs could not see them made.

General theory of operation
---------------------------
A sockops program notes each listener of the proxy when it starts to listen, a sock_create program
each of its sockets. Neither knows what was there before it: a pod that changes over from another
backend, or lost its programs. Nor does an entry that was taken out of the map come back by itself:
to listen once more on a listening socket tells sockops nothing. So the sockets themselves are
fetched. The processes of the proxy's cgroup are searched for those of this pod, and pidfd_getfd
(Linux 5.6) makes each of them ours for long enough to note it. The proxy need not know.

Each worker of the proxy has a listener for each port, and an entry under its number. Here a
listener gets the first number that is free, the eldest worker's first: mostly their own order.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import socket
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

from pyambient.errors import PyambientError
from pyambient.model.numbers import (
    HBONE_PORT,
    INBOUND_PORT,
    MAX_WORKERS,
    OUTBOUND_PORT,
    RESERVED_PORTS,
)
from pyambient.netns import Netns

from .interface import Pod, Stage, step
from .kernel_objects import Map
from .node_pins import existing_map, node_map
from .processes import members

_ALWAYS: Final = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT)
_SYS_PIDFD_GETFD: Final = 438  # on every architecture
_SIOCGSKNS: Final = 0x894C
_SO_COOKIE: Final = 57
_LISTENING: Final = "0A"  # TCP_LISTEN as /proc/net/tcp writes it
_MOST_LISTENERS: Final = 4096
_START_TIME: Final = 19  # of /proc/PID/stat, counted from behind the command
_INODE: Final = 5  # counted from behind the state
_libc = ctypes.CDLL(None, use_errno=True)


Place = tuple[int, int]
"""Where a socket is: the pid of a process and its descriptor."""


@step
@dataclass(frozen=True, slots=True)
class ProxyListeners:
    """What is known of one pod's; nothing is missing where no proxy listens.

    The maps know a listener by its well-known port. `ports` are where they are in this pod, in the
    order of RESERVED_PORTS.
    """

    kind: ClassVar[str] = "bpf-listeners"
    stage: ClassVar[Stage] = Stage.STEER

    bpffs: str
    cgroup: str
    cookie: int
    ports: tuple[int, ...] = RESERVED_PORTS

    def describe(self) -> str:
        return "bpf maps listeners, proxy_sockets += those from before, by pidfd_getfd"

    def apply(self, pod: Pod) -> Self:
        if lost := self._lost(pod, RESERVED_PORTS):
            self._note_sockets(pod)
        for port, places in lost.items():
            self._note_listeners(port, places)
        return self

    def _note_listeners(self, port: int, places: Iterable[Place]) -> None:
        """Note those that are not in the map, each under a number that nobody has."""
        with self._map("listeners") as listeners, self._map("workers") as workers:
            known = self._known(listeners, port, MAX_WORKERS)
            for place in places:
                with _fetched(*place) as listener:
                    if (cookie := _cookie(listener)) in known.values():
                        continue
                    number = next(n for n in itertools.count() if n not in known)
                    if number < MAX_WORKERS:
                        listeners.put(self._key(port, number), struct.pack("=Q", listener))
                        known[number] = cookie
            count = max(known, default=0) + 1
            if count > self._count(workers):
                workers.put(struct.pack("=Q", self.cookie), struct.pack("=I", count))

    def _note_sockets(self, pod: Pod) -> None:
        """Note on every socket that the proxy has in the pod that it is the proxy's.

        Those it keeps in stock for its next connections would else be taken for an app's.
        """
        places = held_sockets(_processes(self._proxies)).values()
        with self._map("proxy_sockets") as noted:
            for place in places:
                with contextlib.suppress(OSError), _fetched(*place) as proxys:
                    if _netns_inode(proxys) == pod.netns.inode:
                        noted.put(struct.pack("=i", proxys), struct.pack("=Q", self.cookie))

    def undo(self, pod: Pod) -> None:
        """Leave the entries, which go with their sockets."""

    def missing(self, pod: Pod) -> str | None:
        ports = " ".join(map(str, self._lost(pod, self._needed())))
        return f"not in the BPF map listeners: {ports}" if ports else None

    def alive(self) -> frozenset[int]:
        """The well-known ports that have a listener in the map: what the hooks go by."""
        in_map = self._in_map(RESERVED_PORTS, self._expected())
        return frozenset(port for port, known in in_map.items() if known)

    def _needed(self) -> tuple[int, ...]:
        """What the hooks look for; a port that the proxy does not serve costs a search."""
        gates = node_map(self.bpffs, "dns_pods")
        if gates is None:
            return _ALWAYS
        with gates:
            is_dns_captured = gates.get(struct.pack("=Q", self.cookie)) is not None
        return RESERVED_PORTS if is_dns_captured else _ALWAYS

    def _lost(self, pod: Pod, ports: Iterable[int]) -> dict[int, list[Place]]:
        """All listeners of the well-known ports for which not all of them are in the map."""
        expected = self._expected()
        in_map = self._in_map(ports, expected)
        absent = [port for port, known in in_map.items() if len(known) < expected]
        if not absent:
            return {}
        held = held_sockets(_processes(self._proxies))
        if not held:
            return {}  # no proxy: the walk through all sockets of the node can be spared
        found: dict[int, list[Place]] = defaultdict(list)
        well_known = dict(zip(self.ports, RESERVED_PORTS, strict=True))
        ports_of = {inode: well_known.get(port) for port, inode in listening(pod.netns)}
        for inode, place in held.items():
            if (port := ports_of.get(inode)) is not None:
                found[port].append(place)
        return {port: found[port] for port in absent if len(found[port]) > len(in_map[port])}

    def _in_map(self, ports: Iterable[int], workers: int) -> dict[int, dict[int, bytes]]:
        """What is there of each port: {number of the worker: cookie of its listener}."""
        listeners = node_map(self.bpffs, "listeners")
        if listeners is None:
            return {}
        with listeners:
            return {port: self._known(listeners, port, workers) for port in ports}

    def _known(self, listeners: Map, port: int, count: int) -> dict[int, bytes]:
        entries = {number: listeners.get(self._key(port, number)) for number in range(count)}
        return {number: cookie for number, cookie in entries.items() if cookie is not None}

    def _expected(self) -> int:
        """How many workers the proxy has said it has."""
        workers = node_map(self.bpffs, "workers")
        if workers is None:
            return 1
        with workers:
            return self._count(workers)

    def _count(self, workers: Map) -> int:
        found = workers.get(struct.pack("=Q", self.cookie))
        return 1 if found is None else int(struct.unpack("=I", found)[0])

    def _key(self, port: int, worker: int) -> bytes:
        return struct.pack("=QII", self.cookie, port, worker)

    def _map(self, name: str) -> Map:
        return existing_map(self.bpffs, name)

    @property
    def _proxies(self) -> Path:
        return Path(self.cgroup, "pyambient-proxy")


@step
@dataclass(frozen=True, slots=True)
class WorkerCount:
    """How many workers the proxy has in a pod: it says so itself, un-enrolment forgets it.

    That is after the proxy has left the pod, or it could say so again.
    """

    kind: ClassVar[str] = "bpf-workers"
    stage: ClassVar[Stage] = Stage.APPLY

    bpffs: str
    cookie: int

    def describe(self) -> str:
        return "bpf map workers: how many the proxy has in this network namespace"

    def apply(self, pod: Pod) -> Self:  # noqa: ARG002 - nothing to add
        return self

    def undo(self, pod: Pod) -> None:  # noqa: ARG002 - the cookie is never used again
        workers = node_map(self.bpffs, "workers")
        if workers is not None:
            with workers:
                workers.delete(struct.pack("=Q", self.cookie))

    def missing(self, pod: Pod) -> str | None:  # noqa: ARG002 - without an entry it is one
        return None


def _processes(cgroup: Path) -> list[int]:
    """The processes in a cgroup and below it, the youngest last."""
    return sorted(members(cgroup), key=lambda pid: (_start_time(pid), pid))


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TIME])
    except OSError:
        return 0


def held_sockets(pids: Iterable[int]) -> dict[int, Place]:
    """{inode: place} of every socket that these processes hold."""
    held = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    kind, _, inode = str(descriptor.readlink()).partition(":[")
                    if kind == "socket":
                        held[int(inode.rstrip("]"))] = (pid, int(descriptor.name))
    return held


def listening(netns: Netns) -> list[tuple[int, int]]:
    """The port and inode of each listening TCP socket."""
    found = []
    with netns.entered():
        for name in ("tcp", "tcp6"):
            with contextlib.suppress(FileNotFoundError):
                found += _read_listening(Path("/proc/thread-self/net", name))
    return found


def _read_listening(table: Path) -> list[tuple[int, int]]:
    """The listeners in a table of /proc/net, where they come first (proc_net_tcp in proc(5))."""
    found = []
    with table.open(encoding="ascii") as lines:
        for line in itertools.islice(lines, 1, _MOST_LISTENERS):
            _, local, _, state, *rest = line.split()
            if state != _LISTENING:
                break
            found.append((int(local.rpartition(":")[2], 16), int(rest[_INODE])))
    return found


def _cookie(descriptor: int) -> bytes:
    """What a look-up in a map of sockets gives for this one."""
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def _netns_inode(sock: int) -> int:
    """Of the namespace that a socket lives in (Linux 4.10)."""
    netns = fcntl.ioctl(sock, _SIOCGSKNS)
    try:
        return os.fstat(netns).st_ino
    finally:
        os.close(netns)


@contextlib.contextmanager
def _fetched(pid: int, number: int) -> Iterator[int]:
    """A copy of another process's descriptor.

    OSError where it is gone meanwhile, PyambientError where fetching is forbidden.
    """
    process = os.pidfd_open(pid)
    try:
        copy = int(_libc.syscall(_SYS_PIDFD_GETFD, process, number, 0))
        code = ctypes.get_errno()
    finally:
        os.close(process)
    if copy < 0 and code == errno.EPERM:
        raise PyambientError(
            f"the sockets of the proxy (pid {pid}) cannot be fetched", "restart the proxy"
        )
    if copy < 0:
        raise OSError(code, os.strerror(code))
    try:
        yield copy
    finally:
        os.close(copy)
