"""DNS with the backend `tc`: what only packets show, and what may go wrong on their way."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import DNS_PORT, RESOLVER_PORT
from tests.bed import Bed, BedPod, Capability, Channel, ClientOptions, apps, capturing
from tests.bed.forging import MORE_FRAGMENTS, Forged, send_packets
from tests.bed.nested import nested, route_to

from .bpf_mesh import BpfMesh
from .dns_apps import (
    Answer,
    ask,
    keep_asking,
    originals,
    queries,
    resolve,
    resolve_tcp,
    resolver_at,
)
from .test_bpf_guard_egress import refuse_tcx

pytestmark = pytest.mark.usefixtures("kernel")
_MARKER = b"a question that must not be on the wire"
_LONG = _MARKER * 100  # more than one packet
_UDP, _FRAGMENT, _DSTOPTS = 17, 44, 60


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BpfMesh, "backend", "tc")


@pytest.fixture
def mesh(bed: Bed) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is a resolver outside the mesh."""
    with BpfMesh(bed, bed.pod("a"), bed.pod("b")) as made:
        resolve(bed.pod("c"))
        yield made


def _without_proxy(mesh: BpfMesh) -> tuple[BedPod, BedPod]:
    assert mesh.proxy is not None
    mesh.proxy.stop_listening()
    return mesh.bed.pods["a"], mesh.bed.pods["c"]


def test_an_app_outside_of_the_cgroup(mesh: BpfMesh, family: str) -> None:
    """What `tc` is for: no hook sees this process, and its query is captured."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    elsewhere = mesh.bed.cgroup.path.parent
    answer = a.run(ask, resolver_at(c, family), b"x", cgroup=elsewhere)
    assert answer.sender == resolver_at(c, family)
    assert originals(mesh) == [("a", DNS_PORT, resolver_at(c, family))]


def test_filters_of_clsact(bed: Bed, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels before 6.6 take does the same."""
    refuse_tcx(monkeypatch)
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    with BpfMesh(bed, a, b) as mesh:
        assert a.run(ask, resolver_at(c, family), b"x").sender == resolver_at(c, family)
        assert len(mesh.intercepted()) == 1


def test_a_socket_connected_before_the_enrolment(bed: Bed, family: str) -> None:
    """Each of its packets is seen, so that it asks by the proxy while the pod is enrolled."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    app = a.spawn(keep_asking, resolver_at(c, family), connected=True)
    assert app.receive() == "ready"
    with BpfMesh(bed, a, b) as mesh:
        assert app.ask("ask") == resolver_at(c, family)
        assert len(mesh.intercepted()) == 1
    assert app.ask("ask") == resolver_at(c, family)


@pytest.mark.parametrize("how", ["unconnected", "connected"])
def test_without_a_listener_it_is_dropped(mesh: BpfMesh, family: str, how: str) -> None:
    """When the proxy is away nothing of a query leaves the pod, in one packet or in several."""
    a, c = _without_proxy(mesh)
    options = ClientOptions(timeout=1)
    with capturing(a) as wire:
        for question in (_MARKER, _LONG):
            connected = how == "connected"
            resolver = resolver_at(c, family)
            assert a.run(ask, resolver, question, options, connected=connected) == -1
    assert queries(wire.packets) == []
    assert [frame for frame in wire.frames if _MARKER in frame] == []


def test_a_query_in_fragments(mesh: BpfMesh, family: str) -> None:
    """It is put together on lo, and other large datagrams go their way."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolve(c, 5353)
    elsewhere = SocketAddress(c.address(family), 5353)
    for _ in range(2):
        assert a.run(ask, resolver_at(c, family), _LONG).data == _LONG
        assert a.run(ask, elsewhere, _LONG).data == _LONG
    assert originals(mesh) == [("a", DNS_PORT, resolver_at(c, family))] * 2


def _forged_query(a: BedPod, c: BedPod, family: str) -> tuple[Forged, bytes]:
    ends = SocketAddress(a.address(family), 4711), resolver_at(c, family)
    data = _MARKER + _MARKER
    return Forged(*ends), struct.pack("!HHHH", 4711, RESOLVER_PORT, 8 + len(data), 0) + data


def _forged_fragments(forged: Forged, udp: bytes) -> Iterable[bytes]:
    for offset, data, more in ((0, udp[:16], 1), (16, udp[16:], 0)):
        if forged.destination.is_ipv6:
            header = struct.pack("!BBHI", _UDP, 0, offset | more, 77)
            yield forged.ipv6(_FRAGMENT, header + data)
        else:
            yield forged.ipv4(_UDP, data, offset // 8 | (MORE_FRAGMENTS if more else 0))


def test_forged_fragments_of_a_query_do_not_leave(mesh: BpfMesh, family: str) -> None:
    """Of an app with CAP_NET_RAW: the later one follows the first."""
    a, c = _without_proxy(mesh)
    forged, udp = _forged_query(a, c, family)
    packets = list(_forged_fragments(forged, udp))
    with capturing(a) as wire:
        a.run(send_packets, packets, forged.destination, capabilities=[Capability.NET_RAW])
        assert a.run(ask, resolver_at(c, family), b"x", ClientOptions(timeout=1)) == -1
    assert [frame for frame in wire.frames if _MARKER in frame] == []


@pytest.mark.parametrize("guard", ["drop", "off"])
def test_a_query_behind_many_headers_does_not_leave(bed: Bed, guard: str) -> None:
    """Where nobody can say what it is, it is none of the pod's packets."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    forged, udp = _forged_query(a, c, "v6")
    padding = bytes([1, 4, 0, 0, 0, 0])
    headers = bytes([_DSTOPTS, 0, *padding]) * 9 + bytes([_UDP, 0, *padding])
    with BpfMesh(bed, a, b) as mesh:
        mesh.options = {"a": mesh.options["a"].changed({"guard": guard})}
        mesh.refresh(a)
        with capturing(a) as wire:
            packets = [forged.ipv6(_DSTOPTS, headers + udp)]
            a.run(send_packets, packets, forged.destination, capabilities=[Capability.NET_RAW])
            assert a.run(ask, resolver_at(c, "v6"), b"x", ClientOptions(timeout=1)) == -1
    assert [frame for frame in wire.frames if _MARKER in frame] == []


def _steal(channel: Channel, address: str, device: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if device:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        thief.bind((address, DNS_PORT))
        channel.send("bound")
        channel.receive()
        thief.settimeout(1)
        try:
            channel.send(thief.recv(100))
        except TimeoutError:
            channel.send(b"")


@pytest.mark.parametrize("device", ["", "lo"])
def test_an_app_beside_the_proxy_gets_nothing(mesh: BpfMesh, family: str, device: str) -> None:
    """Root in the pod may bind the proxy's port as well; what would reach it is dropped."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    everywhere = "0.0.0.0" if family == "v4" else "::"
    with a.spawn(_steal, everywhere, device, uid=0, gid=0) as thief:
        assert thief.receive() == "bound"
        options = ClientOptions(timeout=1)
        answers = [a.run(ask, resolver_at(c, family), b"x", options) for _ in range(4)]
        assert thief.ask("what") == b""
    answered = [answer for answer in answers if isinstance(answer, Answer)]
    assert all(answer.sender == resolver_at(c, family) for answer in answered)


def _ask_and_leave(resolver: SocketAddress) -> None:
    with socket.socket(resolver.family, socket.SOCK_DGRAM) as client:
        client.sendto(_MARKER, resolver.sockaddr())


def test_an_answer_that_nobody_awaits_stays_inside(mesh: BpfMesh, family: str) -> None:
    """What the kernel says of it (port unreachable) holds the answer, and does not leave."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    with capturing(a) as wire:
        a.run(_ask_and_leave, resolver_at(c, family))
        assert a.run(ask, resolver_at(c, family), b"x").sender == resolver_at(c, family)
    # The proxy's query and the resolver's answer.
    assert len([frame for frame in wire.frames if _MARKER in frame]) == 2


def test_a_link_local_resolver(mesh: BpfMesh) -> None:
    """It is asked by the pod's only device, where the app has not bound its socket to it."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    c.ip("addr add fe80::53/64 dev eth0 nodad")
    index = a.run(socket.if_nametoindex, "eth0")
    answer = a.run(ask, SocketAddress(f"fe80::53%{index}", RESOLVER_PORT), b"near")
    assert (answer.data, answer.sender.ip.partition("%")[0]) == (b"near", "fe80::53")


@pytest.mark.parametrize("masquerade", [False, True], ids=["routed", "masqueraded"])
def test_a_query_from_behind_the_pod(bed: Bed, family: str, masquerade: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """An app without a socket in the pod is answered by the resolver it asked, UDP and TCP."""
    a, b, c = bed.pod("a"), bed.pod("b"), bed.pod("c")
    resolve(c)
    resolve_tcp(c)
    with nested(a, masquerade=masquerade) as inner:
        if not masquerade:
            route_to(inner, c, by=a)
        with BpfMesh(bed, a, b) as mesh:
            resolver = resolver_at(c, family)
            with capturing(a) as wire:
                for connected in (False, True):
                    answer = inner.run(ask, resolver, b"from behind", connected=connected)
                    assert (answer.data, answer.sender) == (b"from behind", resolver)
                assert inner.run(apps.request, resolver, b"tcp").data == b"tcp"
            assert originals(mesh) == [("a", DNS_PORT, resolver)] * 3
            assert {p.source.ip for p in queries(wire.packets)} == {a.address(family)}
