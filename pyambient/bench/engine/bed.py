"""Two nodes, as far as a proxy can tell: the pods of one subject, captured as enrolment does it.

    node A, first CPU                         node B, second CPU
    client     10.99.0.2 ─── veth ───── 10.99.0.3  server
    neighbour  10.99.1.2 ─── veth ───── 10.99.1.3     "
    stranger   10.99.2.2 ─── veth ───── 10.99.2.3     "

The load tool runs in `client` and its servers in `server`; A's proxy serves `neighbour` as well.
`stranger` is outside the mesh: nobody captures what it sends. Each subject has a bed of its own, so
all of them are up at once and take turns. Ports and sockets are the real ones: what captures is the
plan of a backend of pyambient's, for Envoy too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import trio

from pyambient.bench.pods import Placement, join, make_pod, sysctl
from pyambient.identity.ca import EmbeddedAuthority
from pyambient.identity.certificate import Certificate
from pyambient.intercept import runner
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Interceptor, Pod, Site, Stage
from pyambient.intercept.survey import survey
from pyambient.model.numbers import DEFAULT_TRUST_DOMAIN
from pyambient.model.spiffe import SpiffeId

CLIENT, NEIGHBOUR, SERVER, STRANGER = "client", "neighbour", "server", "stranger"
NAMESPACE = "bench"
APP_PORT = 9000
CLIENT_IP, SERVER_IP = "10.99.0.2", "10.99.0.3"
NEIGHBOUR_IP, SERVER_IP_FOR_NEIGHBOUR = "10.99.1.2", "10.99.1.3"
STRANGER_IP, SERVER_IP_FOR_STRANGER = "10.99.2.2", "10.99.2.3"
_ENROLLED = (CLIENT, NEIGHBOUR, SERVER)
_CAPTURING = (Stage.APPLY, Stage.STEER, Stage.GATE)
# A connection of the load tool leaves its ports in TIME_WAIT; there are thousands a second.
_MANY_CONNECTIONS = {
    "net__ipv4__tcp_tw_reuse": "1",
    "net__ipv4__ip_local_port_range": "16384 65000",
    "net__ipv4__tcp_max_syn_backlog": "16384",
    "net__core__somaxconn": "16384",
}


class Node:
    """What the beds share: the cgroups, the authority, the backend, the two CPUs."""

    def __init__(self, cgroup: Path, backend: str, cpus: tuple[int, int]) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="pyambient-bench-", dir="/run"))
        self.site = Site(self.work, Path("/sys/fs/bpf/pyambient"), cgroup)
        self.cpus = cpus
        self.apps = cgroup / "apps"
        self.apps.mkdir()
        assert self.site.proxy_cgroup is not None  # noqa: S101 - there is a cgroup
        self.proxies = self.site.proxy_cgroup
        self.proxies.mkdir()
        self.ca_dir = self.work / "ca"
        self.interceptor: Interceptor = choose(backend, self.site)
        self.authority = EmbeddedAuthority.open(self.ca_dir, DEFAULT_TRUST_DOMAIN)

    def certificate(self, name: str) -> Certificate:
        return trio.run(self.authority.sign, identity(name))

    def __repr__(self) -> str:
        return f"<Node {self.interceptor!r}, CPUs {self.cpus}>"


def identity(name: str) -> SpiffeId:
    return SpiffeId(DEFAULT_TRUST_DOMAIN, NAMESPACE, name)


class Bed:
    """The pods of one subject."""

    def __init__(self, node: Node, subject: str) -> None:
        self.node = node
        self.subject = subject
        self.work = node.work / subject
        self.work.mkdir()
        self.pods = {name: make_pod(name) for name in (*_ENROLLED, STRANGER)}
        client, neighbour, server, stranger = self.pods.values()
        join(client, CLIENT_IP, server, SERVER_IP, "eth0")
        join(neighbour, NEIGHBOUR_IP, server, SERVER_IP_FOR_NEIGHBOUR, "eth1")
        join(stranger, STRANGER_IP, server, SERVER_IP_FOR_STRANGER, "eth2")
        for netns in self.pods.values():
            sysctl(netns, **_MANY_CONNECTIONS)

    def app(self, name: str, *, yields: bool = False) -> Placement:
        """Where the load tool runs in a pod."""
        return Placement(self.pods[name], self.node.apps, self._cpu(name), yields)

    def proxy(self, name: str) -> Placement:
        """Where the proxy that serves a pod runs, its pod's network namespace included."""
        return Placement(self.pods[name], self.node.proxies, self._cpu(name))

    def _cpu(self, name: str) -> int:
        return self.node.cpus[name == SERVER]

    def prepare(self) -> None:
        """What comes before the proxies listen."""
        self._apply((Stage.PREPARE,))

    def capture(self) -> None:
        """What comes after."""
        self._apply(_CAPTURING)

    def _apply(self, stages: Iterable[Stage]) -> None:
        for name in _ENROLLED:
            netns = self.pods[name]
            pod = Pod(f"{self.subject}-{name}", netns)
            plan = self.node.interceptor.plan(pod, survey(netns))
            runner.apply_stages(pod, plan.steps, tuple(stages))

    def __repr__(self) -> str:
        return f"<Bed of {self.subject}>"
