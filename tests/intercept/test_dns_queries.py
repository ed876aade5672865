"""DNS with the backends `bpf` and `tc`: two enrolled pods, and resolvers outside the mesh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.selection import Selection
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import (
    DNS_PORT,
    OUTBOUND_PORT,
    PROXY_MARK,
    RESOLVER_PORT,
)
from tests.bed import (
    Bed,
    ClientOptions,
    Interception,
    apps,
    capturing,
    marking,
)

from .bpf_mesh import BpfMesh
from .dns_apps import (
    Answer,
    ask,
    ask_each,
    keep_asking,
    originals,
    queries,
    resolve,
    resolve_tcp,
    resolver_at,
)

both_ways = pytest.mark.parametrize("how", ["unconnected", "connected"])


pytestmark = pytest.mark.usefixtures("bpf_backend")


@pytest.fixture
def mesh(bed: Bed) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is a resolver outside the mesh."""
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        resolve(bed.pod("c"))
        yield made


@both_ways
@pytest.mark.parametrize("bound", ["", "device", "source"])
def test_the_answer_comes_from_the_resolver(
    mesh: BpfMesh, family: str, bound: str, how: str
) -> None:
    """A query goes to the proxy, and the app sees nobody but the resolver."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolver = resolver_at(c, family)
    options = ClientOptions(
        device="eth0" if bound == "device" else None,
        source=a.address(family) if bound == "source" else None,
        timeout=5,
    )

    answer = a.run(ask, resolver, b"who is it", options, connected=how == "connected")

    assert isinstance(answer, Answer), answer
    assert (answer.data, answer.sender) == (b"who is it", resolver)
    assert answer.peer == (resolver if how == "connected" else None)
    if how == "connected":
        assert answer.local.ip == a.address(family)
    (query,) = mesh.intercepted()
    assert query == Interception("a", DNS_PORT, query.peer, resolver)
    assert query.peer == SocketAddress(a.address(family), answer.local.port)


@both_ways
def test_a_v4_mapped_socket(mesh: BpfMesh, how: str) -> None:
    """An IPv6 socket that asks ::ffff:10.77.0.4 asks an IPv4 resolver, and gets its answer."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolver = resolver_at(c, "v4")
    options = ClientOptions(v4_mapped=True, timeout=5)

    answer = a.run(ask, resolver, b"mapped", options, connected=how == "connected")

    assert isinstance(answer, Answer), answer
    assert (answer.data, answer.sender) == (b"mapped", resolver)
    assert answer.peer == (resolver if how == "connected" else None)
    assert originals(mesh) == [("a", DNS_PORT, resolver)]


def test_only_the_proxy_asks_outside(mesh: BpfMesh, family: str) -> None:
    """On the wire is the proxy's own query, which is not captured again, and nothing of the app."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    with capturing(a) as wire:
        answer = a.run(ask, resolver_at(c, family), b"outside")

    (query,) = queries(wire.packets)
    assert (query.destination, query.payload) == (resolver_at(c, family), b"outside")
    assert query.source.port != answer.local.port
    assert len(mesh.intercepted()) == 1


def test_two_resolvers_on_one_socket(mesh: BpfMesh, family: str) -> None:
    """Who asks several from one socket, as musl does, can tell their answers apart."""
    a, c, d = mesh.bed.pods["a"], mesh.bed.pods["c"], mesh.bed.pod("d")
    resolve(d)
    resolvers = [resolver_at(c, family), resolver_at(d, family)]

    answers = a.run(ask_each, resolvers, b"x")

    assert answers == {resolvers[0]: b"x0", resolvers[1]: b"x1"}


def test_pods_do_not_meet(mesh: BpfMesh, family: str) -> None:
    """Two pods that ask one resolver, each has its own: the proxy knows whose query it is."""
    a, b, c = (mesh.bed.pods[name] for name in "abc")
    for pod in (a, b, a):
        assert pod.run(ask, resolver_at(c, family), b"mine").sender == resolver_at(c, family)

    assert [seen.pod for seen in mesh.intercepted()] == ["a", "b", "a"]
    assert {seen.peer.ip for seen in mesh.intercepted()} == {a.address(family), b.address(family)}


def test_a_forged_mark_is_no_way_around(mesh: BpfMesh, family: str) -> None:
    """An app that may set marks and sets the proxy's is captured all the same."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    options = ClientOptions(mark=PROXY_MARK, timeout=5)

    a.run(ask, resolver_at(c, family), b"forged", options, capabilities=marking(a))

    assert originals(mesh) == [("a", DNS_PORT, resolver_at(c, family))]


def test_other_ports_go_their_way(mesh: BpfMesh, family: str) -> None:
    """UDP to any other port is as without the mesh, 15053 of another host included."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    for port in (5353, DNS_PORT):
        resolve(c, port)
        elsewhere = SocketAddress(c.address(family), port)
        assert a.run(ask, elsewhere, b"other").sender == elsewhere
        assert a.run(ask, elsewhere, b"other", connected=True).peer == elsewhere

    assert mesh.intercepted() == []


def test_a_resolver_inside_the_pod(mesh: BpfMesh, family: str) -> None:
    """A pod's own resolver is asked directly; what that asks outside is captured."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    loopback = "127.0.0.53" if family == "v4" else "::1"
    for ip in (loopback, a.address(family)):
        inside = resolve(a, host=ip)
        assert a.run(ask, SocketAddress(ip, RESOLVER_PORT), b"local").data == b"local"
        inside.kill()
    assert mesh.intercepted() == []

    a.run(ask, resolver_at(c, family), b"upstream")
    assert len(mesh.intercepted()) == 1


def test_a_socket_from_before_the_enrolment(bed: Bed, family: str) -> None:
    """An unconnected socket asks directly, then by the proxy while the pod is enrolled."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    app = a.spawn(keep_asking, resolver_at(c, family))
    assert (app.receive(), app.ask("ask")) == ("ready", resolver_at(c, family))

    with BpfMesh(bed, a, b) as mesh:
        assert app.ask("ask") == resolver_at(c, family)
        assert len(mesh.intercepted()) == 1
        mesh.release_stages(a)
        assert app.ask("ask") == resolver_at(c, family)
        assert len(mesh.intercepted()) == 1


def test_tcp_has_its_own_listener(mesh: BpfMesh, family: str) -> None:
    """DNS over TCP comes to 15053, with the resolver as original destination."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolve_tcp(c)

    seen = a.run(apps.request, resolver_at(c, family), b"long question")

    assert (seen.data, seen.peer) == (b"long question", resolver_at(c, family))
    assert originals(mesh) == [("a", DNS_PORT, resolver_at(c, family))]


def test_a_pod_without_dns_capture(bed: Bed, family: str) -> None:
    """Where it is not wanted UDP is asked directly, and TCP is a connection like any other."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    resolve_tcp(c)
    mesh = BpfMesh(bed, a, b)
    mesh.options = dict.fromkeys(("a", "b"), CaptureOptions(dns=False))
    with mesh:
        assert a.run(ask, resolver_at(c, family), b"direct").sender == resolver_at(c, family)
        assert mesh.intercepted() == []
        assert a.run(apps.request, resolver_at(c, family), b"tcp").data == b"tcp"
        assert originals(mesh) == [("a", OUTBOUND_PORT, resolver_at(c, family))]


def test_an_excluded_resolver(bed: Bed, family: str) -> None:
    """What the pod's selection leaves out is asked directly, over UDP as over TCP."""
    a, b, c, d = (bed.pod(name) for name in "abcd")
    for pod in (c, d):
        resolve(pod)
    mesh = BpfMesh(bed, a, b)
    excluded = Selection.from_json({"exclude_cidrs": c.address(family)})
    mesh.options = {"a": CaptureOptions(outbound=excluded)}
    with mesh:
        for how in (False, True):
            answer = a.run(ask, resolver_at(c, family), b"direct", connected=how)
            assert answer.sender == resolver_at(c, family)
        assert mesh.intercepted() == []
        a.run(ask, resolver_at(d, family), b"captured")
        assert originals(mesh) == [("a", DNS_PORT, resolver_at(d, family))]
