"""The proxy's listeners of a pod, put by hand into the map where sockops could not put them.

General theory of operation
---------------------------
A sockops program notes each listener of the proxy when it starts to listen. It cannot note one
that listened before the program was there, and an entry that is taken out of the map does not
come back by itself: to listen once more on a listening socket tells sockops nothing. So the socket
itself is fetched: /proc/net/tcp names its inode, the processes of the proxy's cgroup are searched
for it, and pidfd_getfd (Linux 5.6) makes it ours for long enough to put it in its place. The proxy
need not know. That it is the proxy's is noted on the socket as well, for connections it accepts.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Self

from pyambient.errors import PyambientError
from pyambient.model.numbers import HBONE_PORT, INBOUND_PORT, OUTBOUND_PORT, RESERVED_PORTS
from pyambient.netns import Netns

from .bpf_node import existing_map, node_map
from .interface import Pod, Stage, step

_PORTS: Final = (OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT)
_SYS_PIDFD_GETFD: Final = 438  # on every architecture
_LISTENING: Final = "0A"  # TCP_LISTEN as /proc/net/tcp writes it
_MOST_LISTENERS: Final = 4096
_START_TIME: Final = 19  # of /proc/PID/stat, counted from behind the command
_INODE: Final = 5  # counted from behind the state
_libc = ctypes.CDLL(None, use_errno=True)


@step
@dataclass(frozen=True, slots=True)
class ProxyListeners:
    """The entries of one pod; nothing is missing where no proxy listens."""

    kind: ClassVar[str] = "bpf-listeners"
    stage: ClassVar[Stage] = Stage.STEER

    bpffs: str
    cgroup: str
    cookie: int

    def describe(self) -> str:
        return "bpf map listeners += those that listened before, by pidfd_getfd"

    def apply(self, pod: Pod) -> Self:
        for port, (pid, number) in self._lost(pod).items():
            listener = _fetch(pid, number)
            try:
                self._note(port, listener)
            finally:
                os.close(listener)
        return self

    def undo(self, pod: Pod) -> None:
        """Leave the entries, which go with their sockets."""

    def missing(self, pod: Pod) -> str | None:
        ports = " ".join(map(str, self._lost(pod)))
        return f"not in the BPF map listeners: {ports}" if ports else None

    def alive(self) -> frozenset[int]:
        """The ports for which the pod has a listener in the map: what the hooks go by."""
        listeners = node_map(Path(self.bpffs), "listeners")
        if listeners is None:
            return frozenset()
        with listeners:
            found = (p for p in RESERVED_PORTS if listeners.get(self._key(p)) is not None)
            return frozenset(found)

    def _note(self, port: int, listener: int) -> None:
        bpffs = Path(self.bpffs)
        with existing_map(bpffs, "proxy_sockets") as sockets:
            sockets.put(struct.pack("=i", listener), struct.pack("=Q", self.cookie))
        with existing_map(bpffs, "listeners") as listeners:
            listeners.put(self._key(port), struct.pack("=Q", listener))

    def _lost(self, pod: Pod) -> dict[int, tuple[int, int]]:
        """The listeners that are not in the map: {port: (pid of the proxy, its descriptor)}."""
        listeners = node_map(Path(self.bpffs), "listeners")
        if listeners is None:
            return {}
        with listeners:
            absent = [port for port in _PORTS if listeners.get(self._key(port)) is None]
        if not absent:
            return {}
        held = _held_sockets(_processes(Path(self.cgroup, "pyambient-proxy")))
        if not held:
            return {}  # no proxy: the walk through all sockets of the node can be spared
        found = {port: inode for port, inode in listening(pod.netns) if inode in held}
        return {port: held[found[port]] for port in absent if port in found}

    def _key(self, port: int) -> bytes:
        return struct.pack("=QII", self.cookie, port, 0)


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


def _held_sockets(pids: list[int]) -> dict[int, tuple[int, int]]:
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


def _fetch(pid: int, number: int) -> int:
    """A copy of another process's descriptor; PyambientError where that is forbidden."""
    process = os.pidfd_open(pid)
    try:
        copy = int(_libc.syscall(_SYS_PIDFD_GETFD, process, number, 0))
    finally:
        os.close(process)
    if copy < 0:
        reason = os.strerror(ctypes.get_errno())
        raise PyambientError(
            f"the listeners of the proxy (pid {pid}) cannot be fetched: {reason}",
            "restart the proxy",
        )
    return copy
