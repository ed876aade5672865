"""Attacks by a device that the agent has not seen yet: it has no program of ours to pass.

There is no agent here: `mesh.refresh` is what it does when the kernel has told it of the device.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pyambient.errors import UnsupportedFeature
from pyambient.intercept import runner
from pyambient.intercept.fence import Fence
from pyambient.intercept.nft_messages import Table
from pyambient.intercept.options import CaptureOptions
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import RESOLVER_PORT
from tests.bed import (
    Bed,
    BedPod,
    Capability,
    Capture,
    ClientOptions,
    Network,
    Packet,
    apps,
    capturing,
)
from tests.bed.forging import Datagram, Forged, send_packets, send_tcp
from tests.bed.nested import nested
from tests.bed.snapshot import kernel_state

from .bpf_mesh import PORT, BpfMesh, at, serve, target
from .dns_apps import ask, resolve, resolver_at
from .test_bpf_guard_egress import refuse_tcx

_MARKER = b"plaintext that must not be on the wire"
_RAW = [Capability.NET_RAW]
# Of the apps' own sockets: those of a proxy get theirs from the kernel, from 32768 on.
_SOURCE_PORT = 9000


@pytest.fixture
def pods(bed: Bed) -> tuple[BedPod, BedPod, BedPod]:
    """Pods a and b, and a peer on a network that none of them is on yet."""
    second = bed.add_network(Network("br78", "10.78.0", "fd78::", node_is_router=False))
    return bed.pod("a"), bed.pod("b"), bed.pod("peer", network=second)


@pytest.fixture
def mesh(
    request: pytest.FixtureRequest,
    bed: Bed,
    pods: tuple[BedPod, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[BpfMesh]:
    """Pods a and b enrolled with `tc`, and nothing left of it in the end."""
    monkeypatch.setattr(BpfMesh, "backend", "tc")
    if getattr(request, "param", "") == "clsact":
        refuse_tcx(monkeypatch)
    before = kernel_state(*pods)
    with BpfMesh(bed, *pods[:2]) as made:
        yield made
        _go(made)
    assert kernel_state(*pods) == before


_EITHER_ATTACHMENT = pytest.mark.parametrize("mesh", ["as it is", "clsact"], indirect=True)


def _go(mesh: BpfMesh) -> None:
    """The device leaves, if it came, and the agent sees it."""
    mesh.pods[0].command("sh", "-c", "ip link del eth1 2>&1 || :")
    mesh.refresh(mesh.pods[0])


def _come(mesh: BpfMesh, device: str = "eth1") -> None:
    """A device with an address on the peer's network."""
    mesh.bed.add_device(mesh.pods[0], device, mesh.bed.networks[1])


def _fence(mesh: BpfMesh) -> Fence:
    (found,) = [step for step in mesh.recorded["a"] if isinstance(step, Fence)]
    return found


def _held_back(mesh: BpfMesh) -> int:
    return _fence(mesh).held_back(mesh.pods[0].netns)


def _leaked(capture: Capture) -> list[str]:
    """TCP and DNS of the pod, of whatever kind."""
    return [
        str(packet)
        for packet in capture.packets
        if packet.protocol == socket.IPPROTO_TCP or RESOLVER_PORT in packet.ports
    ] + [repr(frame) for frame in capture.frames if _MARKER in frame]


def _from_apps(packets: list[Packet]) -> list[str]:
    return [str(p) for p in packets if p.source.port == _SOURCE_PORT and p.speaks]


def _send_tcp(to: SocketAddress, device: str | None = None) -> None:
    apps.send_syn(to, _SOURCE_PORT, device)


def _send_query(to: SocketAddress, device: str | None = None) -> None:
    apps.send_datagram(to, _SOURCE_PORT, _MARKER, device)


def test_apps_get_nothing_out(mesh: BpfMesh, pods: tuple[BedPod, ...], family: str) -> None:
    """Nor does who binds to it; each device anew, and in each round it is counted."""
    a, _, peer = pods
    for _ in range(3):
        counted = _held_back(mesh)
        with capturing(peer) as capture:
            _come(mesh)
            for device in (None, "eth1"):
                a.run(_send_tcp, at(peer, family), device)
                a.run(_send_query, resolver_at(peer, family), device)
        assert _leaked(capture) == []
        assert _held_back(mesh) >= counted + 4
        a.ip("link del eth1")


def test_raw_sockets_get_nothing_out(mesh: BpfMesh, pods: tuple[BedPod, ...], family: str) -> None:
    """Not in fragments either."""
    a, _, peer = pods
    _come(mesh)
    source = SocketAddress(a.address(family), 4711)
    segment = Forged(source, at(peer, family), payload=_MARKER)
    query = Datagram(source, resolver_at(peer, family), payload=_MARKER)
    packets = [segment.packet(), query.packet()]
    if family == "v4":
        packets += segment.fragments4()
    else:
        packets += [segment.behind_options(), *segment.fragments6(), *query.fragments6()]
        packets += segment.fragments6_behind_options()
    with capturing(peer) as capture:
        a.run(send_tcp, segment, capabilities=_RAW)
        a.run(send_packets, packets, segment.destination, capabilities=_RAW)
    assert _leaked(capture) == []


@pytest.mark.parametrize("masquerade", [False, True])
def test_what_the_pod_forwards_does_not_get_out(
    bed: Bed,
    pods: tuple[BedPod, ...],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    *,
    masquerade: bool,
) -> None:
    """Of apps behind the pod, which have no socket in it."""
    a, b, peer = pods
    monkeypatch.setattr(BpfMesh, "backend", "tc")
    serve(peer)
    with nested(a, masquerade=masquerade) as inner, BpfMesh(bed, a, b) as mesh:
        with capturing(peer) as capture:
            _come(mesh)
            inner.run(_send_tcp, at(peer, family))
            inner.run(_send_query, resolver_at(peer, family))
        assert _leaked(capture) == []
        assert _held_back(mesh) >= 2
        mesh.refresh(a)
        assert inner.run(apps.request, at(peer, family), _MARKER).data == _MARKER
        _go(mesh)


@_EITHER_ATTACHMENT
def test_it_heals_when_the_agent_has_seen_the_device(
    mesh: BpfMesh, pods: tuple[BedPod, ...], family: str
) -> None:
    """Then what leaves by it is captured; a connection by another device never stopped."""
    a, b, peer = pods
    for pod in (b, peer):
        serve(pod)
    held = a.spawn(apps.hold, at(b, family), 1)
    assert held.receive() == {}
    _come(mesh)
    assert a.run(apps.request, at(peer, family), options=ClientOptions(timeout=1)).failed
    assert _fence(mesh).missing(target(a)) is None
    assert held.ask("ping") == {}
    mesh.refresh(a)
    assert a.run(apps.request, at(peer, family)).data == b"hello"
    assert [s.original for s in mesh.intercepted() if s.pod == "a"][-1] == at(peer, family)
    assert held.ask("ping") == {}
    assert runner.verify(target(a), mesh.recorded["a"]) == []


@_EITHER_ATTACHMENT
def test_another_device_of_the_same_name_is_another(
    mesh: BpfMesh, pods: tuple[BedPod, ...], family: str
) -> None:
    """It is not let past for its name, and found at the next look."""
    a, _, peer = pods
    _come(mesh)
    mesh.refresh(a)
    a.ip("link del eth1")
    with capturing(peer) as capture:
        _come(mesh)
        a.run(_send_tcp, at(peer, family))
    assert _leaked(capture) == []
    lost = runner.lost(target(a), mesh.recorded["a"])
    assert _fence(mesh) in [step for step, _ in lost]
    runner.apply_stages(target(a), [step for step, _ in lost])
    serve(peer)
    assert a.run(apps.request, at(peer, family)).data == b"hello"


def test_other_protocols_pass(mesh: BpfMesh, pods: tuple[BedPod, ...], family: str) -> None:
    """As they do by any device."""
    a, _, peer = pods
    resolve(peer, 5353)
    _come(mesh)
    echoed = a.run(ask, SocketAddress(peer.address(family), 5353), b"x" * 3000)
    assert echoed.data == b"x" * 3000
    assert _held_back(mesh) == 0


@pytest.mark.parametrize("damage", ["flush ruleset", "flush chain inet pyambient leaving"])
def test_a_lost_fence_is_noticed_and_put_back(
    mesh: BpfMesh, pods: tuple[BedPod, ...], family: str, damage: str
) -> None:
    a, _, peer = pods
    a.command("nft", damage)
    assert _fence(mesh).missing(target(a)) is not None
    assert _fence(mesh).apply(target(a)).missing(target(a)) is None
    with capturing(peer) as capture:
        _come(mesh)
        a.run(_send_tcp, at(peer, family))
    assert _leaked(capture) == []


def test_a_dormant_fence_is_noticed(mesh: BpfMesh, pods: tuple[BedPod, ...]) -> None:
    """Its chains are there, and off."""
    a = pods[0]
    a.command("nft", "add table inet pyambient { flags dormant; }")
    assert _fence(mesh).missing(target(a)) == "table inet pyambient is dormant"
    assert _fence(mesh).apply(target(a)).missing(target(a)) is None


@pytest.mark.parametrize(
    ("options", "leaks", "counts"),
    [
        ({"guard": "count"}, {"tcp", "dns"}, True),
        ({"guard": "off"}, {"tcp", "dns"}, False),
        ({"dns": False}, {"dns"}, True),
    ],
)
def test_what_the_operator_chose(
    bed: Bed,
    pods: tuple[BedPod, ...],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    leaks: set[str],
    *,
    counts: bool,
) -> None:
    """The fence is of the guards: it counts where they count, and is gone where they are off."""
    a, b, peer = pods
    monkeypatch.setattr(BpfMesh, "backend", "tc")
    with BpfMesh(bed, a, b, options=CaptureOptions.from_json(options)) as mesh:
        with capturing(peer) as capture:
            _come(mesh)
            a.run(_send_tcp, at(peer, "v4"))
            a.run(_send_query, resolver_at(peer, "v4"))
        fences = [step for step in mesh.recorded["a"] if isinstance(step, Fence)]
        assert [fence.held_back(a.netns) > 0 for fence in fences] == ([True] if counts else [])
        _go(mesh)
    by_port = {PORT: "tcp", RESOLVER_PORT: "dns"}
    sent = {p.destination.port for p in capture.packets} & by_port.keys()
    assert {by_port[port] for port in sent} == leaks


def test_backend_bpf_needs_no_fence_for_apps(
    bed: Bed, pods: tuple[BedPod, ...], family: str
) -> None:
    """Its hooks see each socket: marked for lo whatever the device, refused where it is bound."""
    a, b, peer = pods
    serve(peer)
    with BpfMesh(bed, a, b) as mesh, capturing(peer) as capture:
        _come(mesh)
        for device in (None, "eth1"):
            a.run(_send_tcp, at(peer, family), device)
            a.run(_send_query, resolver_at(peer, family), device)
        mesh.refresh(a)
        a.run(apps.request, at(peer, family))
        _go(mesh)
    assert _from_apps(capture.packets) == []


def test_a_kernel_without_nf_tables(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says so in one line, and nothing of the enrolment stays."""
    a, b = bed.pod("a"), bed.pod("b")
    before = kernel_state(a, b)

    def absent(table: Table, netns: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(Table, "flags", absent)
    monkeypatch.setattr(BpfMesh, "backend", "tc")
    mesh = BpfMesh(bed, a, b)
    mesh.prepare()
    mesh.listen()
    with pytest.raises(runner.StepFailed, match=r"no nf_tables .*--guard off") as refused:
        mesh.capture()
    assert refused.value.exit_code == UnsupportedFeature.exit_code
    mesh.release()
    mesh.proxy.child.kill()
    assert kernel_state(a, b) == before
