"""DNS with the backend `bpf`: two enrolled pods, and resolvers outside the mesh."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from pyambient.intercept import runner
from pyambient.intercept.interface import Stage
from pyambient.intercept.loader import Constants
from pyambient.intercept.netns_cookie import netns_cookie
from pyambient.intercept.node_pins import node_map
from pyambient.intercept.original_dns import slot_key
from pyambient.model.address import SocketAddress, packed_ip
from pyambient.model.numbers import (
    DNS_PORT,
    DNS_SLOT_COUNT,
    RESOLVER_PORT,
)
from tests.bed import (
    Bed,
    BedPod,
    ClientOptions,
    Network,
    capturing,
)

from .bpf_mesh import BPFFS, BpfMesh, target
from .dns_apps import (
    ask,
    keep_asking,
    originals,
    queries,
    resolve,
    resolver_at,
)

both_ways = pytest.mark.parametrize("how", ["unconnected", "connected"])


@pytest.fixture
def mesh(bed: Bed) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is a resolver outside the mesh."""
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        resolve(bed.pod("c"))
        yield made


def _refused(kernel: Constants) -> int:
    return errno.ECONNREFUSED if kernel.has_set_retval else errno.EPERM


@both_ways
def test_without_a_listener_it_is_refused(
    kernel: Constants, mesh: BpfMesh, family: str, how: str
) -> None:
    """When the proxy is away the app learns at once, and nothing of its query leaves the pod."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    assert mesh.proxy is not None
    mesh.proxy.stop_listening()

    with capturing(a) as wire:
        refused = a.run(ask, resolver_at(c, family), b"secret", connected=how == "connected")

    assert refused == _refused(kernel)
    assert queries(wire.packets) == []


def _hold_port(channel, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as impostor:
        impostor.bind((address, DNS_PORT))
        channel.send("bound")
        channel.receive()


def test_an_impostor_gets_nothing(kernel: Constants, bed: Bed, family: str) -> None:
    """Whoever holds the port since before the enrolment is not the proxy: the app is refused."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    impostor = a.spawn(_hold_port, "0.0.0.0" if family == "v4" else "::")
    assert impostor.receive() == "bound"
    mesh = BpfMesh(bed, a, b)
    mesh.prepare()
    mesh.capture()

    assert a.run(ask, resolver_at(c, family), b"secret") == _refused(kernel)
    mesh.release()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_nobody_else_binds_the_port(mesh: BpfMesh, family: str, kind: int) -> None:
    """15053 is the proxy's on every address, those that stand for resolvers included."""

    def bind(ip: str) -> int:
        with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind) as made:
            try:
                made.bind((ip, DNS_PORT))
            except OSError as error:
                return error.errno
        return 0

    a = mesh.bed.pods["a"]
    for ip in ("127.53.0.7", "127.0.0.1", "") if family == "v4" else ("100::53:7", "::1", "::"):
        assert a.run(bind, ip, uid=0, gid=0) == errno.EPERM


def test_a_socket_connected_before_the_enrolment(bed: Bed, family: str) -> None:
    """No hook sees what it sends; the guard does, and lets no query past the forwarder."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    app = a.spawn(keep_asking, resolver_at(c, family), connected=True)
    assert app.receive() == "ready"

    with BpfMesh(bed, a, b) as mesh:
        assert app.ask("ask") == -1
        assert mesh.intercepted() == []


def test_answers_arrive_while_the_pod_is_released(mesh: BpfMesh, family: str) -> None:
    """The gate closes first: an app that has asked by then gets its answer from the resolver."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    app = a.spawn(keep_asking, resolver_at(c, family), connected=True)
    assert (app.receive(), app.ask("ask")) == ("ready", resolver_at(c, family))

    mesh.release_stages(a, (Stage.GATE, Stage.STEER))

    assert app.ask("ask") == resolver_at(c, family)
    assert a.run(ask, resolver_at(c, family), b"direct").data == b"direct"
    assert len(mesh.intercepted()) == 2


def test_un_enrolment_empties_the_pods_slots(mesh: BpfMesh, family: str) -> None:
    """Of a pod that is released no resolver is remembered, of the other one all."""
    a, b, c = (mesh.bed.pods[name] for name in "abc")
    for pod in (a, b):
        pod.run(ask, resolver_at(c, family), b"x")
    assert _owners() == {_cookie(mesh, a), _cookie(mesh, b)}

    mesh.release_stages(a)

    assert _owners() == {_cookie(mesh, b)}
    assert a.run(ask, resolver_at(c, family), b"direct").sender == resolver_at(c, family)
    assert len(mesh.intercepted()) == 2


def _owners() -> set[int]:
    with node_map(BPFFS, "resolvers") as entries:
        return {struct.unpack_from("=Q", key)[0] for key in list(entries.keys())}


def _cookie(mesh: BpfMesh, pod: BedPod) -> int:
    return netns_cookie(pod.netns, mesh.site.cgroup)


def test_a_pod_that_asks_very_many(mesh: BpfMesh, family: str) -> None:
    """Slots in use are nobody else's, so the app is refused; one at rest is given away."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]

    _occupy(_cookie(mesh, a), time.monotonic_ns())
    assert a.run(ask, resolver_at(c, family), b"x") in (errno.ECONNREFUSED, errno.EPERM)

    _occupy(_cookie(mesh, a), time.monotonic_ns() - 61 * 10**9)
    assert a.run(ask, resolver_at(c, family), b"x").sender == resolver_at(c, family)
    assert originals(mesh) == [("a", DNS_PORT, resolver_at(c, family))]


def _occupy(cookie: int, used: int) -> None:
    """Give all slots of a pod to resolvers that it asked at this time."""
    with node_map(BPFFS, "resolvers") as entries:
        for number in range(DNS_SLOT_COUNT):
            ip = packed_ip(f"192.0.{2 + number // 256}.{number % 256}")
            entries.put(slot_key(cookie, number), struct.pack("=16sQII", ip, used, 0, 0))


def test_a_device_that_comes_later(bed: Bed, family: str) -> None:
    """A socket bound to a new device is refused until the refresh, then it is captured."""
    second = bed.add_network(Network("br78", "10.78.0", "fd78::"))
    a, b, peer = bed.pod("a"), bed.pod("b"), bed.pod("peer", network=second)
    resolve(peer)
    by_device = ClientOptions(device="eth1", timeout=5)
    with BpfMesh(bed, a, b) as mesh:
        bed.add_device(a, "eth1", second)

        with capturing(a, "eth1") as wire:
            early = a.run(ask, resolver_at(peer, family), b"early", by_device)
        assert early in (errno.ENETUNREACH, errno.EPERM)
        assert queries(wire.packets) == []

        mesh.refresh(a)
        late = a.run(ask, resolver_at(peer, family), b"late", by_device)

        assert (late.data, late.sender) == (b"late", resolver_at(peer, family))
        assert originals(mesh) == [("a", DNS_PORT, resolver_at(peer, family))]


def test_a_family_that_the_pod_lacks(kernel: Constants, bed: Bed) -> None:
    """In a pod with IPv6 alone, IPv4 resolvers are unreachable and IPv6 ones captured."""
    a, b, c = bed.pod("a", ipv4=False), bed.pod("b"), bed.pod("c")
    resolve(c)
    with BpfMesh(bed, a, b) as mesh:
        unreachable = errno.ENETUNREACH if kernel.has_set_retval else errno.EPERM
        assert a.run(ask, resolver_at(c, "v4"), b"x") == unreachable
        assert a.run(ask, resolver_at(c, "v6"), b"x").sender == resolver_at(c, "v6")
        assert originals(mesh) == [("a", DNS_PORT, resolver_at(c, "v6"))]


def test_a_link_local_resolver(mesh: BpfMesh) -> None:
    """It is found again by the device of the app's socket, or by the pod's only one."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    c.ip("addr add fe80::53/64 dev eth0 nodad")
    index = a.run(socket.if_nametoindex, "eth0")
    resolver = SocketAddress(f"fe80::53%{index}", RESOLVER_PORT)

    bound = a.run(ask, resolver, b"near", ClientOptions(device="eth0", timeout=5))
    free = a.run(ask, resolver, b"near", ClientOptions(timeout=5))

    for answer in (bound, free):
        assert (answer.data, answer.sender.ip.partition("%")[0]) == (b"near", "fe80::53")
    assert [seen.original for seen in mesh.intercepted()] == [resolver, resolver]


def test_a_lost_slot_route_is_found_and_repaired(mesh: BpfMesh, family: str) -> None:
    """Verification names it, applying the record again brings it back."""
    a = mesh.bed.pods["a"]
    ip = "ip route del local 127.53.0.0/22" if family == "v4" else "ip -6 route del 100::53:0/118"
    a.command(*ip.split(), "dev", "eth0", "table", "local")
    steps = mesh.recorded["a"]
    assert [s.kind for s in steps if s.missing(target(a))] == ["slot-route"]

    runner.apply_stages(target(a), steps)

    assert runner.verify(target(a), steps) == []
