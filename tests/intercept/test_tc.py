"""Backend `tc` beside what it shares with `bpf`: devices, who is asked for, what it prints."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.errors import UnsupportedFeature
from pyambient.intercept import runner, tc
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Pod, PodAddress, PodNetwork, Site, Stage
from pyambient.intercept.loader import Constants
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.tc import Tc
from pyambient.intercept.tc_steps import Redirect
from pyambient.model.numbers import OUTBOUND_PORT, PROXY_MARK
from pyambient.netns import Netns
from tests.bed import Bed, BedPod, CgroupTree, apps, capturing, marking
from tests.bed.snapshot import kernel_state

from .bpf_mesh import PORT, BpfMesh, at, serve, target
from .test_bpf_guard_egress import refuse_tcx

GOLDEN = Path(__file__).parent / "golden"
SITE = Site(Path("/run/pyambient"), Path("/sys/fs/bpf/pyambient"), Path("/sys/fs/cgroup"))
DUAL_STACK = PodNetwork(
    (PodAddress("10.0.1.2", "eth0"), PodAddress("fd00:1::2", "eth0")), ("eth0",), has_ipv6=True
)
_MARKER = b"bytes of a captured socket"


@pytest.fixture(params=["as it is", "clsact"])
def attached_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this kernel takes, and what kernels before 6.6 do."""
    if request.param == "clsact":
        refuse_tcx(monkeypatch)
    return str(request.param)


@pytest.fixture
def pods(bed: Bed) -> tuple[BedPod, BedPod, BedPod]:
    return bed.pod("a"), bed.pod("b"), bed.pod("outside")


@pytest.fixture
def mesh(
    bed: Bed, pods: tuple[BedPod, ...], attached_by: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[BpfMesh]:
    """Pods a and b enrolled, and nothing left of it when they are freed."""
    monkeypatch.setattr(BpfMesh, "backend", "tc")
    before = kernel_state(*pods)
    with BpfMesh(bed, *pods[:2]) as made:
        yield made
    assert kernel_state(*pods) == before


def _redirects(mesh: BpfMesh, pod: BedPod) -> list[Redirect]:
    return [step for step in mesh.recorded[pod.name] if isinstance(step, Redirect)]


def test_both_directions_by_either_attachment(mesh, pods, family) -> None:
    """Links and filters do the same."""
    a, b, outside = pods
    serve(outside)
    serve(b)
    assert a.run(apps.request, at(outside, family)).data == b"hello"
    assert a.run(apps.request, at(b, family)).data == b"hello"
    assert outside.run(apps.request, at(b, family)).data == b"hello"
    assert [s.pod for s in mesh.intercepted()] == ["a", "a", "b", "b"]


def test_without_a_listener_it_is_refused_at_once(mesh, pods, family) -> None:
    """The program answers in the proxy's place, bound to a device or not; nothing leaves."""
    a, _, outside = pods
    serve(outside)
    mesh.proxy.child.kill()
    with capturing(a) as capture:
        for device in (None, "eth0"):
            options = apps.ClientOptions(device=device)
            exchange = a.run(apps.request, at(outside, family), options=options)
            assert (exchange.stage, exchange.errno) == ("connect", errno.ECONNREFUSED)
    assert [str(p) for p in capture.packets if PORT in p.ports] == []


def _change_mark_and_send(destination, mark):
    with socket.socket(destination.family) as client:
        client.settimeout(5)
        client.connect(destination.sockaddr())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.sendall(_MARKER)
        return client.recv(100)


@pytest.mark.parametrize("mark", [PROXY_MARK, 0])
def test_a_mark_changes_nothing(mesh, pods, family, mark) -> None:
    """Captured is captured: the redirect knows the socket, and reads no mark."""
    a, _, outside = pods
    serve(outside)
    there = at(outside, family)
    assert a.run(_change_mark_and_send, there, mark, capabilities=marking(a)) == _MARKER
    assert [(s.port, s.original) for s in mesh.intercepted()] == [(OUTBOUND_PORT, there)]


def test_a_lost_redirect_is_noticed_and_put_back(mesh, pods, attached_by, family) -> None:
    """Ahead of the guard, as before."""
    a, _, outside = pods
    serve(outside)
    (redirect,) = _redirects(mesh, a)
    redirect.undo(target(a))
    assert redirect.missing(target(a)) == "no redirect on eth0"
    assert redirect.apply(target(a)).missing(target(a)) is None
    assert a.run(apps.request, at(outside, family)).data == b"hello"
    assert len(mesh.intercepted()) == 1


def test_a_second_device_is_captured(bed, mesh, pods, attached_by, family) -> None:
    """Each device has a redirect of its own, and loses it with the device."""
    a, _, outside = pods
    bed.add_device(a, "eth1", bed.network)
    mesh.refresh(a)
    assert [redirect.device for redirect in _redirects(mesh, a)] == ["eth0", "eth1"]
    assert runner.verify(target(a), mesh.recorded[a.name]) == []
    serve(outside)
    by_device = apps.ClientOptions(device="eth1")
    assert a.run(apps.request, at(outside, family), options=by_device).data == b"hello"
    assert len(mesh.intercepted()) == 1
    a.ip("link del eth1")
    mesh.refresh(a)
    assert [redirect.device for redirect in _redirects(mesh, a)] == ["eth0"]


def test_an_app_outside_of_the_cgroup_is_captured(mesh, pods, family) -> None:
    """What `tc` is for: the hooks of `bpf` would not see this process."""
    a, _, outside = pods
    serve(outside)
    elsewhere = mesh.bed.cgroup.path.parent
    assert a.run(apps.request, at(outside, family), cgroup=elsewhere).data == b"hello"
    assert len(mesh.intercepted()) == 1


def test_auto_is_tc_for_processes_that_hooks_do_not_see(bed, cgroup_tree: CgroupTree) -> None:
    """A pod with a process outside of --cgroup gets `tc`, its neighbour `bpf`."""
    site = BpfMesh(bed).site
    seen, unseen = bed.pod("seen"), bed.pod("unseen")
    with unseen.spawn(_wait, cgroup=cgroup_tree.path.parent) as process:
        process.receive()
        assert choose("auto", site, seen.netns).name == "bpf"
        assert choose("auto", site, unseen.netns).name == "tc"


def test_auto_is_not_bpf_for_what_comes_in_by_a_device(bed) -> None:
    """A pod whose virtual interfaces are to be captured gets `tc`, which sees them."""
    site, pod = BpfMesh(bed).site, bed.pod("a")
    options = CaptureOptions(virtual_interfaces="tap0")
    assert choose("auto", site, pod.netns, options).name == "tc"


def _wait(channel) -> None:
    channel.send(os.getpid())
    channel.receive()


def test_without_cgroup2_the_proxy_cannot_be_known() -> None:
    """`tc` says so in one line."""
    with pytest.raises(UnsupportedFeature) as refused:
        Tc(Site(SITE.run_dir, SITE.bpffs, None), Constants())
    assert str(refused.value) == (
        "this kernel has no cgroup2 (Linux 4.5 and later do);"
        " mount it ('mount -t cgroup2 none DIR') and give --cgroup DIR"
    )


@pytest.mark.parametrize(
    ("name", "constants"),
    [("tc-dual-stack", Constants(has_ingress_ifindex=True)), ("tc-linux-5.10", Constants())],
)
def test_a_plan_reads_as_its_golden_file(
    name: str, constants: Constants, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step, in its order and stage."""
    monkeypatch.setattr(tc, "netns_cookie", lambda *_: 1)
    with Netns.empty() as netns:
        plan = Tc(SITE, constants).plan(Pod("any", netns), DUAL_STACK)
    assert plan.render() == (GOLDEN / f"{name}.txt").read_text()
    assert [step.stage for step in plan.steps] == sorted(step.stage for step in plan.steps)
    assert plan.steps[-1].stage is Stage.GATE
