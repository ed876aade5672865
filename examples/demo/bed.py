"""The ground the demo stands on: a node with a bridge, and three pods on it.

    node   mesh0 (bridge)  10.77.0.1  fd77::1
             |-- client    10.77.0.2  fd77::2
             |-- server    10.77.0.3  fd77::3
             `-- outsider  10.77.0.4  fd77::4

A pod is a network namespace and nothing else. Its processes run as nobody, without capabilities,
in the demo's cgroup: what an application in a container is.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from pyambient.errors import PyambientError

from .patience import patience

BRIDGE = "mesh0"
_NOBODY = ("--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all")
_PATIENCE = patience(5.0)
_ENTER_CGROUP = 'echo $$ >"$0" && exec "$@"'


def _ip(script: str) -> None:
    """Run the lines of `script` as one batch of ip(8)."""
    subprocess.run(["ip", "-batch", "-"], input=script, text=True, check=True)


def _wait_for_link_local(pod: Pod) -> None:
    """Wait for the address that the kernel adds by itself: nothing changes by itself after it."""
    deadline = time.monotonic() + _PATIENCE
    ask = ["ip", "-netns", pod.name, "-6", "route", "show", "table", "local", "type", "local"]
    while (
        "local fe80:" not in subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    ):
        if time.monotonic() > deadline:
            raise PyambientError(f"{pod} gets no IPv6 address", "is IPv6 turned off here?")
        time.sleep(0.02)


@dataclass(frozen=True)
class Pod:
    """A network namespace on the bridge, and the cgroup its processes run in."""

    name: str
    ipv4: str
    ipv6: str
    cgroup: Path

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a command inside the pod: cgroup, network namespace, nobody."""
        enter = ["sh", "-c", _ENTER_CGROUP, str(self.cgroup / "cgroup.procs")]
        netns = ["nsenter", f"--net=/run/netns/{self.name}"]
        return [*enter, *netns, "setpriv", *_NOBODY, *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end, which has to come."""
        command = self.command(*arguments)
        return subprocess.run(
            command, capture_output=True, text=True, timeout=patience(20), check=False
        )

    def fetch(self, ip: str, port: int, path: str) -> subprocess.CompletedProcess[str]:
        """Ask curl for `path` at `ip`: the body on stdout, the reason of a failure on stderr."""
        host = f"[{ip}]" if ":" in ip else ip
        quiet = (
            "--silent",
            "--show-error",
            "--fail",
            "--noproxy",
            "*",
            "--max-time",
            f"{patience(8):.0f}",
        )
        return self.run("curl", *quiet, f"http://{host}:{port}{path}")

    def __str__(self) -> str:
        return self.name


class Bed:
    """The node and its pods; lives as long as the mount and network namespaces around it."""

    def __init__(self, cgroup: Path) -> None:
        """Build all of it in the calling process's namespaces, which must be the demo's own."""
        self._apps = cgroup / "apps"
        self._apps.mkdir()
        self._mount()
        _ip(
            f"link set lo up\n"
            f"link add {BRIDGE} type bridge mcast_snooping 0\n"
            f"address add 10.77.0.1/24 dev {BRIDGE}\n"
            f"address add fd77::1/64 dev {BRIDGE} nodad\n"
            f"link set {BRIDGE} up\n"
        )
        self.client, self.server, self.outsider = (
            self._pod(name, number)
            for number, name in enumerate(("client", "server", "outsider"), start=2)
        )
        for pod in self.pods:
            _wait_for_link_local(pod)

    @staticmethod
    def _mount() -> None:
        """A /run and a bpffs that nobody else sees."""
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
        if Path("/sys/fs/bpf").is_dir():
            subprocess.run(["mount", "-t", "bpf", "bpf", "/sys/fs/bpf"], check=True)

    def _pod(self, name: str, number: int) -> Pod:
        pod = Pod(name, f"10.77.0.{number}", f"fd77::{number}", self._apps)
        _ip(
            f"netns add {name}\n"
            f"link add {name} type veth peer name eth0 netns {name}\n"
            f"link set {name} master {BRIDGE} up\n"
        )
        inside = (
            "link set lo up\n"
            f"address add {pod.ipv4}/24 dev eth0\n"
            f"address add {pod.ipv6}/64 dev eth0 nodad\n"
            "link set eth0 up\n"
            "route add default via 10.77.0.1\n"
            "route add default via fd77::1\n"
        )
        subprocess.run(["ip", "-netns", name, "-batch", "-"], input=inside, text=True, check=True)
        return pod

    @property
    def pods(self) -> tuple[Pod, ...]:
        return (self.client, self.server, self.outsider)

    def __repr__(self) -> str:
        return f"<Bed {', '.join(map(str, self.pods))} on {BRIDGE}>"
