"""The proxy's sockets of a pod, made known by hand where the programs could not see them made.

General theory of operation
---------------------------
A sockops program notes each listener of the proxy when it starts to listen, a sock_create program
each of its sockets. Neither knows what was there before it: a pod that changes over from another
backend, or lost its programs. Nor does an entry that was taken out of the map come back by itself:
to listen once more on a listening socket tells sockops nothing. So the sockets themselves are
fetched. The processes of the proxy's cgroup are searched for those of this pod, and pidfd_getfd
(Linux 5.6) makes each of them ours for long enough to note it. The proxy need not know.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

from pyambient.errors import PyambientError
from pyambient.model.numbers import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, RESERVED_PORTS
from pyambient.netns import Netns

from .bpf_node import existing_map, node_map
from .interface import Pod, Stage, step
from .kernel_objects import Map

_ALWAYS: Final = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT)
_SYS_PIDFD_GETFD: Final = 438  # on every architecture
_SIOCGSKNS: Final = 0x894C
_LISTENING: Final = "0A"  # TCP_LISTEN as /proc/net/tcp writes it
_MOST_LISTENERS: Final = 4096
_START_TIME: Final = 19  # of /proc/PID/stat, counted from behind the command
_INODE: Final = 5  # counted from behind the state
_libc = ctypes.CDLL(None, use_errno=True)


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
        for port, place in lost.items():
            with _fetched(*place) as listener, self._map("listeners") as listeners:
                listeners.put(self._key(port), struct.pack("=Q", listener))
        return self

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
        listeners = node_map(Path(self.bpffs), "listeners")
        if listeners is None:
            return frozenset()
        with listeners:
            found = (p for p in RESERVED_PORTS if listeners.get(self._key(p)) is not None)
            return frozenset(found)

    def _needed(self) -> tuple[int, ...]:
        """What the hooks look for; a port that the proxy does not serve costs a search."""
        gates = node_map(Path(self.bpffs), "dns_pods")
        if gates is None:
            return _ALWAYS
        with gates:
            is_dns_captured = gates.get(struct.pack("=Q", self.cookie)) is not None
        return RESERVED_PORTS if is_dns_captured else _ALWAYS

    def _lost(self, pod: Pod, ports: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Those that are not in the map: {well-known port: (pid of the proxy, its descriptor)}."""
        listeners = node_map(Path(self.bpffs), "listeners")
        if listeners is None:
            return {}
        with listeners:
            absent = [port for port in ports if listeners.get(self._key(port)) is None]
        if not absent:
            return {}
        held = held_sockets(_processes(self._proxies))
        if not held:
            return {}  # no proxy: the walk through all sockets of the node can be spared
        found = {port: inode for port, inode in listening(pod.netns) if inode in held}
        places = dict(zip(RESERVED_PORTS, self.ports, strict=True))
        return {port: held[found[places[port]]] for port in absent if places[port] in found}

    def _key(self, port: int) -> bytes:
        return struct.pack("=QII", self.cookie, port, 0)

    def _map(self, name: str) -> Map:
        return existing_map(Path(self.bpffs), name)

    @property
    def _proxies(self) -> Path:
        return Path(self.cgroup, "pyambient-proxy")


def _processes(cgroup: Path) -> list[int]:
    """The processes in a cgroup and below it, the youngest last."""
    pids: list[int] = []
    for file in cgroup.rglob("cgroup.procs"):
        with contextlib.suppress(OSError):
            pids += map(int, file.read_text("ascii").split())
    return sorted(pids, key=_start_time)


def _start_time(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_START_TIME])
    except OSError:
        return 0


def held_sockets(pids: Iterable[int]) -> dict[int, tuple[int, int]]:
    """{inode: (pid, descriptor)} of every socket that these processes hold."""
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
