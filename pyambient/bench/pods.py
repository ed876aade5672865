"""Network namespaces joined by veth pairs, and programs that run in them.

A bench pod has no name in /run/netns: it lives as long as its file descriptor, so nothing of it
can be left behind.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pyambient.netns import Netns


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a program runs: its pod, its cgroup, the CPU it is pinned to.

    One that `yields` gets the CPU only while nobody else there wants it (SCHED_IDLE).
    """

    netns: Netns
    cgroup: Path
    cpu: int
    yields: bool = False

    def start(
        self,
        command: Sequence[str],
        *,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[str]:
        """Start a program there; its standard streams are text."""
        with self.netns.entered():
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                text=True,
                pass_fds=pass_fds,
                preexec_fn=self._settler(),  # noqa: PLW1509 - one thread, nothing holds a lock
            )

    def _settler(self) -> Callable[[], None]:
        """A socket belongs for life to the cgroup it is made in: the process moves first."""
        procs, cpu, yields = os.fsencode(self.cgroup / "cgroup.procs"), self.cpu, self.yields

        def settle() -> None:
            fd = os.open(procs, os.O_WRONLY)
            os.write(fd, b"0")
            os.close(fd)
            os.sched_setaffinity(0, {cpu})
            if yields:
                os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

        return settle


def ip(netns: Netns, *commands: str) -> None:
    """Run `ip -batch` in a pod, one command a string."""
    script = "".join(f"{command}\n" for command in commands)
    with netns.entered():
        subprocess.run(["ip", "-batch", "-"], input=script, text=True, check=True)


def sysctl(netns: Netns, **values: str) -> None:
    """Set sysctls of a pod; `net__ipv4__tcp_tw_reuse` is net.ipv4.tcp_tw_reuse."""
    with netns.entered():
        for name, value in values.items():
            Path("/proc/sys", *name.split("__")).write_text(value, "ascii")


def make_pod(name: str) -> Netns:
    """An empty pod whose loopback is up."""
    netns = Netns.empty()
    netns.name = name
    ip(netns, "link set lo up")
    return netns


def add_address(netns: Netns, address: str, device: str) -> None:
    """Give a device one more address, with its prefix length; usable at once."""
    nodad = " nodad" if ":" in address else ""
    ip(netns, f"address add {address} dev {device}{nodad}")


def join(left: Netns, left_address: str, right: Netns, right_address: str, device: str) -> None:
    """Join two pods by a veth pair, `device` on both sides, a /24 on each."""
    there = f"/proc/{os.getpid()}/fd/{right.fd}"
    ip(left, f"link add {device} type veth peer name {device} netns {there}")
    for netns, address in ((left, left_address), (right, right_address)):
        ip(netns, f"address add {address}/24 dev {device}", f"link set {device} up")
