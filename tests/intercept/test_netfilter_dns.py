"""DNS with the netfilter backends: two enrolled pods, and resolvers outside the mesh."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from pyambient.intercept.ctnetlink import Conntrack
from pyambient.intercept.interface import Interceptor
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.runner import StepFailed
from pyambient.intercept.selection import Selection
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import DNS_PORT, OUTBOUND_PORT, RESOLVER_PORT
from tests.bed import Bed, ClientOptions, Interception, Packet, apps, capturing

from .dns_apps import Answer, ask, ask_each, keep_asking, resolve, resolve_tcp, resolver_at
from .netfilter_mesh import INTERCEPTORS, NetfilterMesh

both_ways = pytest.mark.parametrize("how", ["unconnected", "connected"])
legacy_too = pytest.mark.parametrize("interceptor", list(INTERCEPTORS), indirect=True)


@pytest.fixture
def mesh(bed: Bed, interceptor: Interceptor) -> Iterator[NetfilterMesh]:
    """Pods a and b enrolled; pod c of the bed is a resolver outside the mesh."""
    with NetfilterMesh(bed, bed.pod("a"), bed.pod("b"), interceptor=interceptor) as made:
        resolve(bed.pod("c"))
        yield made


def _originals(mesh: NetfilterMesh) -> list[tuple[str, int, SocketAddress]]:
    return [(seen.pod, seen.port, seen.original) for seen in mesh.intercepted()]


def _queries(packets: list[Packet]) -> list[Packet]:
    """What of the packets is a query, to whichever of the ports."""
    return [p for p in packets if p.ports[1] in (RESOLVER_PORT, DNS_PORT)]


@legacy_too
@both_ways
def test_the_answer_comes_from_the_resolver(mesh: NetfilterMesh, family: str, how: str) -> None:
    """A query goes to the proxy, and the app sees nobody but the resolver."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolver = resolver_at(c, family)
    options = ClientOptions(source=a.address(family) if how == "connected" else None, timeout=5)

    answer = a.run(ask, resolver, b"who is it", options, connected=how == "connected")

    assert isinstance(answer, Answer), answer
    assert (answer.data, answer.sender) == (b"who is it", resolver)
    assert answer.peer == (resolver if how == "connected" else None)
    (query,) = mesh.intercepted()
    assert query == Interception("a", DNS_PORT, query.peer, resolver)
    assert query.peer == SocketAddress(a.address(family), answer.local.port)


@both_ways
def test_a_v4_mapped_socket(mesh: NetfilterMesh, how: str) -> None:
    """An IPv6 socket that asks ::ffff:10.77.0.4 asks an IPv4 resolver, and gets its answer."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    options = ClientOptions(v4_mapped=True, timeout=5)

    answer = a.run(ask, resolver_at(c, "v4"), b"mapped", options, connected=how == "connected")

    assert (answer.data, answer.sender) == (b"mapped", resolver_at(c, "v4"))
    assert _originals(mesh) == [("a", DNS_PORT, resolver_at(c, "v4"))]


def test_only_the_proxy_asks_outside(mesh: NetfilterMesh, family: str) -> None:
    """On the wire is the proxy's own query alone, and conntrack knows just the app's."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    with capturing(a) as wire:
        answer = a.run(ask, resolver_at(c, family), b"outside")

    (query,) = _queries(wire.packets)
    assert (query.destination, query.payload) == (resolver_at(c, family), b"outside")
    assert query.source.port != answer.local.port
    with Conntrack(a.netns) as conntrack:
        entries = conntrack.entries(socket.AF_INET if family == "v4" else socket.AF_INET6)
    assert [entry.opening.source.port for entry in entries] == [answer.local.port]


def test_pods_do_not_meet(mesh: NetfilterMesh, family: str) -> None:
    """Two pods that ask one resolver, each has its own: the proxy knows whose query it is."""
    a, b, c = (mesh.bed.pods[name] for name in "abc")
    for pod in (a, b, a):
        assert pod.run(ask, resolver_at(c, family), b"mine").sender == resolver_at(c, family)

    assert [seen.pod for seen in mesh.intercepted()] == ["a", "b", "a"]


def test_other_ports_go_their_way(mesh: NetfilterMesh, family: str) -> None:
    """UDP to any other port is as without the mesh."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolve(c, 5353)
    elsewhere = SocketAddress(c.address(family), 5353)

    assert a.run(ask, elsewhere, b"other").sender == elsewhere
    assert mesh.intercepted() == []


def test_a_resolver_inside_the_pod(mesh: NetfilterMesh, family: str) -> None:
    """A pod's own resolver is asked directly; what that asks outside is captured."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    for ip in ("127.0.0.1", "127.0.0.53") if family == "v4" else ("::1",):
        with resolve(a, host=ip):
            assert a.run(ask, SocketAddress(ip, RESOLVER_PORT), b"local").data == b"local"
    with resolve(a, host=a.address(family)):
        assert a.run(ask, resolver_at(a, family), b"own").data == b"own"
    assert mesh.intercepted() == []

    a.run(ask, resolver_at(c, family), b"upstream")
    assert len(mesh.intercepted()) == 1


@both_ways
def test_without_a_listener_nothing_leaves(mesh: NetfilterMesh, family: str, how: str) -> None:
    """When the proxy is away a connected socket is refused, any other waits for nothing."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    mesh.proxy.stop_listening()

    with capturing(a) as wire:
        options = ClientOptions(timeout=1)
        failure = a.run(
            ask, resolver_at(c, family), b"secret", options, connected=how == "connected"
        )

    assert failure == (errno.ECONNREFUSED if how == "connected" else -1)
    assert _queries(wire.packets) == []


@both_ways
def test_a_device_bound_socket_is_refused(mesh: NetfilterMesh, family: str, how: str) -> None:
    """It cannot reach localhost by its device, and gets nothing out."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    options = ClientOptions(device="eth0", timeout=1)
    with capturing(a) as wire:
        failure = a.run(
            ask, resolver_at(c, family), b"secret", options, connected=how == "connected"
        )

    assert failure == errno.EPERM
    assert _queries(wire.packets) == []


@both_ways
def test_a_socket_from_before_the_enrolment(
    bed: Bed, interceptor: Interceptor, family: str, how: str
) -> None:
    """It asks by the proxy while its pod is enrolled, also where conntrack knew its flow before."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    _track(a)
    app = a.spawn(keep_asking, resolver_at(c, family), connected=how == "connected")
    assert (app.receive(), app.ask("ask")) == ("ready", resolver_at(c, family))

    with NetfilterMesh(bed, a, b, interceptor=interceptor) as mesh:
        assert app.ask("ask") == resolver_at(c, family)
        assert len(mesh.intercepted()) == 1
    assert app.ask("ask") == resolver_at(c, family)


def _track(pod) -> None:
    """An app's own rule, which has the kernel track connections."""
    rule = "add rule inet app output ct state established accept"
    chain = "add chain inet app output { type filter hook output priority 0; }"
    pod.command("nft", "-f", "-", text=f"add table inet app\n{chain}\n{rule}\n")


def test_two_resolvers_on_one_socket(mesh: NetfilterMesh, family: str) -> None:
    """Who asks several from one socket, as musl does, can tell their answers apart."""
    a, c, d = mesh.bed.pods["a"], mesh.bed.pods["c"], mesh.bed.pod("d")
    resolve(d)
    resolvers = [resolver_at(c, family), resolver_at(d, family)]

    assert a.run(ask_each, resolvers, b"x") == {resolvers[0]: b"x0", resolvers[1]: b"x1"}

    asked = [(seen.original, seen.peer.ip) for seen in mesh.intercepted()]
    assert asked == [(resolver, a.address(family)) for resolver in resolvers]


def test_tcp_has_its_own_listener(mesh: NetfilterMesh, family: str) -> None:
    """DNS over TCP comes to 15053, with the resolver as original destination."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolve_tcp(c)

    seen = a.run(apps.request, resolver_at(c, family), b"long question")

    assert (seen.data, seen.peer) == (b"long question", resolver_at(c, family))
    assert _originals(mesh) == [("a", DNS_PORT, resolver_at(c, family))]


def test_a_pod_without_dns_capture(bed: Bed, interceptor: Interceptor, family: str) -> None:
    """Where it is not wanted UDP is asked directly, and TCP is a connection like any other."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    resolve_tcp(c)
    mesh = NetfilterMesh(bed, a, b, interceptor=interceptor)
    mesh.options = dict.fromkeys(("a", "b"), CaptureOptions(dns=False))
    with mesh:
        assert a.run(ask, resolver_at(c, family), b"direct").sender == resolver_at(c, family)
        assert mesh.intercepted() == []
        assert a.run(apps.request, resolver_at(c, family), b"tcp").data == b"tcp"
        assert _originals(mesh) == [("a", OUTBOUND_PORT, resolver_at(c, family))]


def test_dns_capture_is_switched_on_a_live_pod(mesh: NetfilterMesh, family: str) -> None:
    """One socket asks by the proxy, directly, and by the proxy again, as its pod is told."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    app = a.spawn(keep_asking, resolver_at(c, family), connected=True)
    assert app.receive() == "ready"

    for dns, intercepted in ((True, 1), (False, 1), (True, 2)):
        mesh.options = {"a": CaptureOptions(dns=dns)}
        mesh.refresh(a)
        assert app.ask("ask") == resolver_at(c, family)
        assert len(mesh.intercepted()) == intercepted


def test_an_excluded_resolver(mesh: NetfilterMesh, family: str) -> None:
    """What the pod's selection leaves out is asked directly, over UDP as over TCP."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    for choice in ({"exclude_cidrs": c.address(family)}, {"exclude_ports": "53"}):
        mesh.options = {"a": CaptureOptions(outbound=Selection.from_json(choice))}
        mesh.refresh(a)
        assert a.run(ask, resolver_at(c, family), b"direct").sender == resolver_at(c, family)
    assert mesh.intercepted() == []


@legacy_too
def test_a_change_that_fails_leaves_the_pod_captured(
    mesh: NetfilterMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flows that cannot be forgotten fail a change of choices, and do not open the pod."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ENOBUFS, "no room")

    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    mesh.options["a"] = CaptureOptions(outbound=Selection.from_json({"exclude_ports": "9"}))
    with monkeypatch.context() as patched:
        patched.setattr(type(mesh.interceptor).__module__ + ".forget_dns_flows", fails)
        with pytest.raises(StepFailed):
            mesh.refresh(a)
    there = SocketAddress(c.address("v4"), 8080)
    a.run(apps.request, there, b"hello")
    assert _originals(mesh) == [("a", OUTBOUND_PORT, there)]
