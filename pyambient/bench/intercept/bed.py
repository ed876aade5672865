"""The pods of one cell, fresh for it, and whoever of them is enrolled.

    client  10.99.0.2, fd99::2 ─── veth ─── 10.99.0.3, fd99::3  server

All that runs is pinned to one CPU: waking another one up can cost more than what is measured here,
and varies (interception is about microseconds). Nothing outlives a cell but the crowd, where what
is measured is what other pods cost that are enrolled as well.
"""

from __future__ import annotations

import contextlib
import ipaddress
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyambient.bench.pods import Placement, add_address, ip, join, make_pod, sysctl
from pyambient.intercept import runner
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Interceptor, Pod, Site, Stage, Step
from pyambient.intercept.options import DEFAULTS, CaptureOptions
from pyambient.intercept.selection import Cidr, Selection
from pyambient.intercept.survey import survey
from pyambient.model.backends import WITH_PROGRAMS
from pyambient.netns import Netns

from .crowd import Crowd
from .work import BOTH, CLIENT, OTHERS, SERVER, Cell

_CLIENT_IPS: Final = {"v4": "10.99.0.2", "v6": "fd99::2"}
_SERVER_IPS: Final = {"v4": "10.99.0.3", "v6": "fd99::3"}
_NULL_PROXIES: Final = {"bpf": "steered", "tc": "turned"}
_CAPTURING = (Stage.APPLY, Stage.STEER, Stage.GATE)
# A table of its own for each pod: the TIME_WAITs of others slow down the search for a free port
# (Linux 6.1; without it all share the node's).
_OWN_TABLE = {"net__ipv4__tcp_child_ehash_entries": "65536"}
_MANY_CONNECTIONS = {
    "net__ipv4__tcp_tw_reuse": "1",
    "net__ipv4__ip_local_port_range": "16384 65000",
    "net__ipv4__tcp_max_syn_backlog": "16384",
    "net__core__somaxconn": "16384",
}


class Node:
    """What all cells share: the cgroups, the backends, the CPU."""

    def __init__(self, cgroup: Path, cpu: int) -> None:
        self.cpu = cpu
        self.cgroup = cgroup
        self.work = Path(tempfile.mkdtemp(prefix="pyambient-bench-", dir="/run"))
        self.site = Site(Path("/run/pyambient-bench"), Path("/sys/fs/bpf/pyambient"), cgroup)
        self.apps = cgroup / "apps"
        self.proxies = cgroup / "pyambient-proxy"
        self.apps.mkdir()
        self._interceptors: dict[str, Interceptor] = {}
        self._crowd = Crowd()
        self._enrolled: list[tuple[Pod, tuple[Step, ...]]] = []
        with Netns.own() as own, contextlib.suppress(FileNotFoundError):
            sysctl(own, **_OWN_TABLE)

    def interceptor(self, backend: str) -> Interceptor:
        """The backend; PyambientError if this node has no such."""
        if backend not in self._interceptors:
            self._interceptors[backend] = choose(backend, self.site)
        return self._interceptors[backend]

    def enrol_others(self, count: int, backend: str) -> Iterator[int]:
        """Have so many pods enrolled beside those of the cells; how many there are, one by one."""
        interceptor = self.interceptor(backend)
        for netns in self._crowd.grow(count):
            pod = Pod(f"bench-{netns.name}", netns)
            steps = interceptor.plan(pod, survey(netns)).steps
            self._enrolled.append((pod, runner.apply_stages(pod, steps)))
            yield len(self._enrolled)

    def free_others(self) -> None:
        """Free them all, and end them."""
        while self._enrolled:
            runner.undo_stages(*self._enrolled.pop())
        self._crowd.close()
        self._crowd = Crowd()

    def __repr__(self) -> str:
        return f"<Node on CPU {self.cpu}>"


class Bed:
    """Two pods, joined, or three; `enrolled` are those that `capture` captures."""

    def __init__(self, node: Node, cell: Cell) -> None:
        self.node = node
        self.backend = cell.subject.backend
        self.server_ip = _SERVER_IPS[cell.family]
        self.pods = {name: make_pod(name) for name in (CLIENT, SERVER)}
        self._join(self.pods[CLIENT], self.pods[SERVER])
        whose = cell.subject.enrolled
        if whose == OTHERS:
            self.pods[OTHERS] = _lone_pod()
        self.enrolled = {
            name: Pod(f"bench-{name}", self.pods[name])
            for name in self.pods
            if whose in (name, BOTH)
        }
        self._options = _options(cell)
        self._applied: dict[str, tuple[Step, ...]] = dict.fromkeys(self.enrolled, ())

    def _join(self, client: Netns, server: Netns) -> None:
        join(client, _CLIENT_IPS["v4"], server, _SERVER_IPS["v4"], "eth0")
        for netns, ips in ((client, _CLIENT_IPS), (server, _SERVER_IPS)):
            add_address(netns, f"{ips['v6']}/64", "eth0")
            sysctl(netns, **_MANY_CONNECTIONS)

    def addresses(self, name: str) -> tuple[str, ...]:
        """Those of one of the two pods that speak."""
        ips = _CLIENT_IPS if name == CLIENT else _SERVER_IPS
        return tuple(ips.values())

    def app(self, name: str) -> Placement:
        return Placement(self.pods[name], self.node.apps, self.node.cpu)

    def proxy(self, name: str) -> Placement:
        """Where the proxy of one pod runs."""
        return self.proxy_in(self.pods[name])

    def proxy_in(self, netns: Netns) -> Placement:
        """Where a proxy runs; the last pod of backend `bpf` has taken the cgroup along."""
        self.node.proxies.mkdir(exist_ok=True)
        return Placement(netns, self.node.proxies, self.node.cpu)

    @property
    def steers(self) -> bool:
        """Whether connections keep their addresses; the other backends translate them."""
        return self.backend in WITH_PROGRAMS

    @property
    def null_proxy(self) -> str:
        """How null.c has to serve the enrolled pods."""
        return _NULL_PROXIES.get(self.backend, "redirected")

    def prepare(self) -> None:
        """What comes before the proxies listen."""
        self._apply((Stage.PREPARE,))

    def capture(self) -> None:
        """What comes after."""
        self._apply(_CAPTURING)

    def _apply(self, stages: tuple[Stage, ...]) -> None:
        for name, pod in self.enrolled.items():
            network = survey(pod.netns)
            plan = self.node.interceptor(self.backend).plan(pod, network, self._options)
            self._applied[name] += runner.apply_stages(pod, plan.steps, stages)

    def close(self) -> None:
        for name, pod in self.enrolled.items():
            runner.undo_stages(pod, self._applied[name])
        for netns in self.pods.values():
            netns.close()

    def __repr__(self) -> str:
        return f"<Bed with {' and '.join(self.enrolled) or 'nobody'} enrolled by {self.backend}>"


def _lone_pod() -> Netns:
    """A pod that speaks to nobody."""
    made = make_pod(OTHERS)
    ip(
        made,
        "link add eth0 type veth peer name eth1",
        "address add 10.97.0.2/24 dev eth0",
        "address add fd97::2/64 dev eth0 nodad",
        "link set eth0 up",
        "link set eth1 up",
    )
    return made


def _options(cell: Cell) -> CaptureOptions:
    if not cell.excluded:
        return DEFAULTS
    cidrs = tuple(_elsewhere(number, cell.family) for number in range(cell.excluded))
    return CaptureOptions(outbound=Selection(exclude_cidrs=cidrs))


def _elsewhere(number: int, family: str) -> Cidr:
    """A CIDR that nobody here has an address of."""
    high, low = divmod(number, 256)
    text = f"20.{high}.{low}.0/24" if family == "v4" else f"fd20:{number:x}::/48"
    return ipaddress.ip_network(text)


@contextlib.contextmanager
def bed(node: Node, cell: Cell) -> Iterator[Bed]:
    """The pods of a cell, for as long as the block runs."""
    made = Bed(node, cell)
    try:
        yield made
    finally:
        made.close()
