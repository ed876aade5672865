"""The guard on the node's end of a pod's veth: what passes the pod's own guard stops there."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept.egress_guard import EgressGuard
from pyambient.intercept.node_guard import NodeGuard, peer_index
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.runner import verify
from tests.bed import Bed, BedPod, Capability, apps, capturing
from tests.bed.forging import Forged, Frame, send_frames
from tests.bed.network import command
from tests.bed.snapshot import kernel_state
from tests.bed.xdp import xdp_sender

from .bpf_mesh import BpfMesh, at, drops_of, serve, target
from .test_bpf_guard_attacks import MARKER, mac_of
from .test_bpf_guard_egress import refuse_tcx

_NET_RAW = [Capability.NET_RAW]


@pytest.fixture(params=["this kernel", "no tcx"])
def pods(request, bed: Bed, monkeypatch) -> tuple[BedPod, BedPod, BedPod]:
    """Attached both ways where this kernel has both."""
    if request.param == "no tcx":
        refuse_tcx(monkeypatch)
    return bed.pod("a"), bed.pod("b"), bed.pod("outside")


@pytest.fixture(params=["drop", "count"])
def mode(request: pytest.FixtureRequest) -> str:
    """What becomes of what the guards object to."""
    return str(request.param)


@pytest.fixture
def mesh(bed: Bed, pods, mode: str) -> Iterator[BpfMesh]:
    """Two pods, guarded on the node as well; nothing of it is left in the end."""
    before = kernel_state(*pods), node_hooks(pods)
    with BpfMesh(bed, *pods[:2], options=CaptureOptions(guard=mode, guard_node=True)) as made:
        yield made
    assert (kernel_state(*pods), node_hooks(pods)) == before


def node_hooks(pods: tuple[BedPod, ...]) -> list[str]:
    """The qdiscs of the node's ends."""
    return [command("tc", "qdisc", "show", "dev", pod.veths["eth0"]) for pod in pods]


def dropped(pod: BedPod) -> dict[str, int]:
    return {reason: count for reason, count in drops_of(pod).counts.items() if count}


def forged_frame(a: BedPod, outside: BedPod, family: str) -> tuple[Frame, bytes]:
    segment = Forged(at(a, family, 4711), at(outside, family, 80), payload=MARKER)
    kind = 0x86DD if family == "v6" else 0x0800
    return Frame(mac_of(outside), kind, kind), segment.packet()


def test_what_the_guard_passes_passes_here(mesh, pods, family):
    """Connections of the proxy's, both ways, small and large; other protocols."""
    a, b, outside = pods
    with serve(b), serve(outside):
        for pod, to in ((a, b), (a, outside), (outside, a), (b, outside)):
            with serve(to, 9090):
                seen = pod.run(apps.request, at(to, family, 9090), b"x" * 300_000)
                assert len(seen.data) == 300_000
    assert (dropped(a), dropped(b)) == ({}, {})
    assert [verify(target(pod), mesh.recorded[pod.name]) for pod in (a, b)] == [[], []]


def test_a_packet_socket_that_bypasses_tc(mesh, pods, mode, family):
    """PACKET_QDISC_BYPASS gets a frame out of the pod, and no further."""
    a, b, outside = pods
    frame, packet = forged_frame(a, outside, family)
    with capturing(outside) as capture:
        a.run(send_frames, frame, [packet], bypass=True, capabilities=_NET_RAW)
    arrived = any(MARKER in seen for seen in capture.frames)
    assert (arrived, dropped(a), dropped(b)) == (mode == "count", {"unsigned": 1}, {})
    del mesh


def test_an_xdp_socket(mesh, pods, mode, family):
    """AF_XDP does without tc by its nature."""
    a, _, outside = pods
    frame, packet = forged_frame(a, outside, family)

    def send() -> None:
        with xdp_sender("eth0") as sender:
            sender.send(frame.bytes(packet))

    with capturing(outside) as capture:
        a.run(send, capabilities=_NET_RAW)
    arrived = any(MARKER in seen for seen in capture.frames)
    assert (arrived, dropped(a)) == (mode == "count", {"unsigned": 1})
    del mesh


def test_without_the_pods_guard_no_tcp_gets_out(mesh, pods, mode, family):
    """Root in the pod may take it away; with it put back all is as before."""
    a, _, outside = pods
    (guard,) = [step for step in mesh.recorded[a.name] if isinstance(step, EgressGuard)]
    with serve(outside):
        guard.undo(target(a))
        seen = a.run(apps.request, at(outside, family), options=apps.ClientOptions(timeout=2))
        assert (seen.data == b"hello") == (mode == "count")
        assert set(dropped(a)) == {"unsigned"}
        guard.apply(target(a))
        assert a.run(apps.request, at(outside, family)).data == b"hello"


def test_a_device_without_a_veth_end_is_refused(bed, pods):
    """A macvlan has nothing on the node where one could look; nothing stays behind."""
    a, b, _ = pods
    a.ip("link add mv0 link eth0 type macvlan mode private", "link set mv0 up")
    before = kernel_state(*pods)
    mesh = BpfMesh(bed, a, b, options=CaptureOptions(guard_node=True))
    mesh.prepare()
    mesh.listen()
    with pytest.raises(PyambientError, match="mv0 of a has no veth peer on the node"):
        mesh.capture()
    mesh.__exit__()
    assert kernel_state(*pods) == before


def test_the_peer_is_the_one_that_names_the_pod(bed, pods):
    """An index alone would be any device's on the node."""
    a, b, _ = pods
    indices = [
        json.loads(command("ip", "-j", "link", "show", pod.veths["eth0"]))[0]["ifindex"]
        for pod in (a, b)
    ]
    assert [peer_index(pod.netns, "eth0") for pod in (a, b)] == indices
    bed.add_device(a, "eth1", bed.network)
    a.ip("link add in0 type veth peer name in1")
    assert [peer_index(a.netns, name) for name in ("in0", "in1", "lo", "none")] == [None] * 4
    assert NodeGuard("x", "eth0", 1).place.name == "guard_node"
