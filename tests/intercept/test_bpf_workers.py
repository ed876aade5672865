"""Several workers of one proxy: each has its share, stands in for others, and nobody joins them."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from collections.abc import Iterator

import pytest

from pyambient.intercept.listeners import ProxyListeners
from pyambient.intercept.netns_cookie import netns_cookie
from pyambient.intercept.node_pins import node_map
from pyambient.model.numbers import INBOUND_PORT, OUTBOUND_PORT, RESERVED_PORTS
from pyambient.proxy.sockets import Place
from tests.bed import Bed, BedPod, Channel, apps
from tests.bed.nullproxy import NullProxy

from .bpf_mesh import BPFFS, BpfMesh, at, serve, target

pytestmark = pytest.mark.usefixtures("bpf_backend", "kernel")
_WORKERS = 3
# The share of one that gets none of so many is below a millionth: (2/3) ** 40 * 3.
_CONNECTIONS = 40


class Workers(BpfMesh):
    """Pods a and b served by several workers; pod c of the bed is outside the mesh."""

    def __init__(self, bed: Bed, *pods: BedPod) -> None:
        super().__init__(bed, *pods)
        self.workers: list[NullProxy] = []

    def start(self, number: int, total: int = _WORKERS) -> NullProxy:
        return NullProxy.of(self.bed, self.pods, self.backend, Place(number, total))

    def listen(self) -> NullProxy:
        self.workers = [self.start(number) for number in range(_WORKERS)]
        self.proxy = self.workers[0]
        return self.proxy

    def shares(self, client: BedPod, there: apps.SocketAddress, port: int) -> list[int]:
        """How many of a client's connections each worker gets; all of them work."""
        before = [len(self._at(worker, port)) for worker in self.workers]
        with client.spawn(apps.hold, there, _CONNECTIONS) as held:
            assert held.receive() == {}
            after = [len(self._at(worker, port)) for worker in self.workers]
            held.send("stop")
            held.wait()
        return [now - then for now, then in zip(after, before, strict=True)]

    @staticmethod
    def _at(worker: NullProxy, port: int) -> list[object]:
        return [one for one in worker.accepted() if one.port == port] if worker.child.alive else []

    def __exit__(self, *_: object) -> None:
        super().__exit__(*_)
        for worker in self.workers:
            worker.child.kill()


@pytest.fixture
def mesh(bed: Bed) -> Iterator[Workers]:
    """Enrolled and served."""
    with Workers(bed, bed.pod("a"), bed.pod("b")) as made:
        serve(bed.pod("c"))
        serve(bed.pods["a"])
        yield made


def _is_relayed(client: BedPod, there: apps.SocketAddress) -> bool:
    return bool(client.run(apps.request, there).data == b"hello")


def test_each_worker_gets_a_share(mesh: Workers, family: str) -> None:
    """Out of the pod and into it, and none more than twice what is even."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    for client, server, port in ((a, c, OUTBOUND_PORT), (c, a, INBOUND_PORT)):
        shares = mesh.shares(client, at(server, family), port)
        assert sum(shares) == _CONNECTIONS
        assert 0 < min(shares) <= max(shares) <= 2 * _CONNECTIONS / _WORKERS


@pytest.mark.parametrize("gone", range(_WORKERS))
def test_others_stand_in_for_a_worker_that_is_gone(mesh: Workers, family: str, gone: int) -> None:
    """Until it is back; when none is left nothing goes out or comes in."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    mesh.workers[gone].child.kill()
    shares = mesh.shares(a, at(c, family), OUTBOUND_PORT)
    assert shares[gone] == 0
    assert sum(shares) == _CONNECTIONS

    mesh.workers[gone] = mesh.start(gone)
    assert min(mesh.shares(a, at(c, family), OUTBOUND_PORT)) > 0

    for worker in mesh.workers:
        worker.child.kill()
    options = apps.ClientOptions(timeout=1)
    assert a.run(apps.request, at(c, family), options=options).stage == "connect"
    assert c.run(apps.request, at(a, family), options=options).stage == "connect"


def test_what_one_worker_holds_outlives_another(mesh: Workers, family: str) -> None:
    """The connections of the dead are lost, and only those."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    with a.spawn(apps.hold, at(c, family), _CONNECTIONS) as held:
        assert held.receive() == {}
        lost = len(mesh.workers[2].accepted())
        mesh.workers[2].child.kill()
        assert len(held.ask("ping")) == lost
        assert len(held.ask("ping")) == lost


def test_one_proxy_after_several_workers_gets_all(mesh: Workers, family: str) -> None:
    """What the others said of their number is forgotten when one says nothing."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    only = NullProxy.of(mesh.bed, mesh.pods, mesh.backend)
    with only:
        for worker in mesh.workers:
            worker.stop_listening()
        assert all(_is_relayed(a, at(c, family)) for _ in range(5))
        assert len(only.accepted()) == 5
        with node_map(BPFFS, "workers") as counts:
            assert list(counts.keys()) == []


def _join(channel: Channel, port: int) -> None:
    """Be one of the listeners of a port, as the kernel sees it; say who connected at the end."""
    with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as joined:
        joined.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        joined.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            joined.bind(("::", port))
        except PermissionError:
            channel.send("denied")
            return
        joined.listen(100)
        joined.setblocking(False)
        channel.send("joined")
        channel.receive()
        got = []
        with contextlib.suppress(BlockingIOError):
            while True:
                got.append(joined.accept())
        channel.send(len(got))


@pytest.mark.parametrize("port", [OUTBOUND_PORT, INBOUND_PORT])
def test_root_in_the_pod_does_not_become_a_worker(
    mesh: Workers, bpf_backend: str, family: str, port: int
) -> None:
    """The kernel lets whoever has the proxy's uid join its SO_REUSEPORT group; nothing comes of it.

    `bpf` denies the bind already, `tc` has no hook there.
    """
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    with a.spawn(_join, port, uid=0, gid=0) as app:
        assert app.receive() == ("denied" if bpf_backend == "bpf" else "joined")
        client, server = (a, c) if port == OUTBOUND_PORT else (c, a)
        assert sum(mesh.shares(client, at(server, family), port)) == _CONNECTIONS
        if bpf_backend == "tc":
            assert app.ask("got") == 0


def _only_listeners(mesh: BpfMesh, pod: BedPod) -> ProxyListeners:
    (step,) = (s for s in mesh.recorded[pod.name] if isinstance(s, ProxyListeners))
    return step


def test_listeners_of_all_workers_are_found_again(mesh: Workers, family: str) -> None:
    """Entries that are lost, some of them or all, are put back, and each worker has its share."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    step, cookie = _only_listeners(mesh, a), netns_cookie(a.netns, mesh.bed.cgroup.path)
    for lost, said in (((1,), True), (range(_WORKERS), False)):
        with node_map(BPFFS, "listeners") as entries, node_map(BPFFS, "workers") as counts:
            for port, number in itertools.product(RESERVED_PORTS, lost):
                entries.delete(struct.pack("=QII", cookie, port, number))
            if not said:
                counts.delete(struct.pack("=Q", cookie))
        assert step.missing(target(a)) == "not in the BPF map listeners: 15001 15006 15008 15053"

        step.apply(target(a))

        assert step.missing(target(a)) is None
        assert min(mesh.shares(a, at(c, family), OUTBOUND_PORT)) > 0


def test_a_pod_that_is_freed_leaves_no_number(mesh: Workers) -> None:
    """What the workers said of themselves goes with the pod, the other's stays."""
    a, b = mesh.pods
    for worker in mesh.workers:
        worker.child.kill()
    mesh.release_stages(a)
    with node_map(BPFFS, "workers") as counts:
        assert list(counts.keys()) == [
            struct.pack("=Q", netns_cookie(b.netns, mesh.bed.cgroup.path))
        ]


def test_several_workers_that_came_before_the_capture(bed: Bed, family: str) -> None:
    """A pod that changes over from a backend without programs: nobody saw its listeners made."""
    mesh = Workers(bed, bed.pod("a"), bed.pod("b"))
    serve(bed.pod("c"))
    mesh.listen()
    try:
        mesh.prepare()
        mesh.capture()
        assert min(mesh.shares(bed.pods["a"], at(bed.pods["c"], family), OUTBOUND_PORT)) > 0
    finally:
        mesh.__exit__()
