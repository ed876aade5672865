"""The steps of backend `bpf`: repeated, checked, repaired, and undone without a trace."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept import guard_maps, runner
from pyambient.intercept.bpf import Bpf
from pyambient.intercept.bpf_node import NodePrograms
from pyambient.intercept.bpf_steps import NodeStep
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import (
    Pod,
    PodAddress,
    PodNetwork,
    Site,
    Stage,
    from_record,
    to_record,
)
from pyambient.intercept.kernel_objects import AttachType, Link
from pyambient.intercept.loader import Constants, load
from pyambient.intercept.netns_cookie import netns_cookie
from pyambient.intercept.node_hooks import GUARD, HOOKS, LOOKUP, MAPS, Place
from pyambient.intercept.node_pins import node_map, pod_directory
from tests.bed import Bed, BedPod, Channel, apps
from tests.bed.snapshot import kernel_state

from .bpf_mesh import BPFFS, BpfMesh, at, links_on, serve, target
from .clang import foreign_program


@pytest.fixture
def pair(bed: Bed, kernel: Constants) -> tuple[BedPod, BedPod]:
    return bed.pod("a"), bed.pod("b")


def test_nothing_is_left_behind(bed: Bed, pair: tuple[BedPod, BedPod]) -> None:
    """After un-enrolment nodes and pods are as before: pins, links, routes, rules, sysctls."""
    before = kernel_state(*pair)
    assert links_on(bed.cgroup.path, *pair) == set()

    with BpfMesh(bed, *pair):
        assert kernel_state(*pair) != before
        assert len(links_on(bed.cgroup.path, bed.cgroup.proxy, *pair)) == len(HOOKS) + 2

    assert kernel_state(*pair) == before
    assert links_on(bed.cgroup.path, bed.cgroup.proxy, *pair) == set()


def test_undo_needs_just_the_record(bed: Bed, pair: tuple[BedPod, BedPod]) -> None:
    """Steps read back from their JSON are undone although the pod's namespace cannot be entered."""
    a, b = pair
    with BpfMesh(bed, a, b) as mesh:
        record = [s for s in to_record(mesh.recorded["a"]) if s["kind"].startswith("bpf-")]
        gone = Pod(target(a).uid, a.netns.duplicate())
        gone.netns.close()

        runner.undo_stages(gone, from_record(record))

        assert {p.name for p in (BPFFS / "pods").iterdir()} == {"uid%2Eof%2Eb"}
        for name in ("pods", "addresses", "devices", "dns_pods"):
            with node_map(BPFFS, name) as entries:
                cookies = {struct.unpack_from("=Q", key)[0] for key in list(entries.keys())}
            assert cookies == {netns_cookie(b.netns, bed.cgroup.path)}
    assert not BPFFS.exists()


def test_steps_can_be_repeated(bed: Bed, pair: tuple[BedPod, BedPod]) -> None:
    """Applying a recorded step again changes nothing, and all of them say that they are there."""
    with BpfMesh(bed, *pair) as mesh:
        links = links_on(bed.cgroup.path, bed.cgroup.proxy, *pair)
        for pod in pair:
            steps = mesh.recorded[pod.name]
            assert runner.apply_stages(target(pod), steps) == steps
            assert runner.verify(target(pod), steps) == []
        assert links_on(bed.cgroup.path, bed.cgroup.proxy, *pair) == links


def test_the_plan_is_the_same_twice(bed: Bed, pair: tuple[BedPod, BedPod]) -> None:
    """Planning has no effect, and gives steps that survive being written down."""
    before = kernel_state(*pair)
    mesh = BpfMesh(bed, *pair)

    plan = mesh.plan(pair[0])

    assert plan == mesh.plan(pair[0])
    assert from_record(to_record(plan.steps)) == plan.steps
    assert [s.stage for s in plan.steps] == sorted(s.stage for s in plan.steps)
    assert plan.steps[-1].stage is Stage.GATE
    assert kernel_state(*pair) == before


def test_an_exchanged_route_closes_its_device(bed: Bed, pair: tuple[BedPod, BedPod]) -> None:
    """With another source address a device loses its entry before it loses its route."""
    backend, pod = choose("bpf", BpfMesh(bed, *pair).site), target(pair[0])
    before, after = (
        backend.plan(pod, PodNetwork((PodAddress(ip, "eth0"),), ("eth0",), has_ipv6=False)).steps
        for ip in ("10.77.0.2", "10.77.0.9")
    )

    gone = [s.kind for s in before if s not in after and getattr(s, "device", "") == "eth0"]
    added = [s.kind for s in after if s not in before and getattr(s, "device", "") == "eth0"]

    assert gone == added == ["route", "slot-route", "bpf-device"]


def _remove_gate(mesh: BpfMesh, pod: BedPod) -> None:
    with node_map(BPFFS, "pods") as pods:
        pods.delete(struct.pack("=Q", netns_cookie(pod.netns, mesh.site.cgroup)))


def _remove_addresses(mesh: BpfMesh, pod: BedPod) -> None:
    with node_map(BPFFS, "addresses") as addresses:
        for key in list(addresses.keys()):
            addresses.delete(key)


def _remove_devices(mesh: BpfMesh, pod: BedPod) -> None:
    with node_map(BPFFS, "devices") as devices:
        for key in list(devices.keys()):
            devices.delete(key)


def _remove_dns_gate(mesh: BpfMesh, pod: BedPod) -> None:
    with node_map(BPFFS, "dns_pods") as pods:
        pods.delete(struct.pack("=Q", netns_cookie(pod.netns, mesh.site.cgroup)))


def _remove_slots(mesh: BpfMesh, pod: BedPod) -> None:
    (BPFFS / "node" / "resolvers").unlink()


def _remove_steering(mesh: BpfMesh, pod: BedPod) -> None:
    (pod_directory(BPFFS, target(pod).uid) / "sk_lookup").unlink()


def _remove_a_link(mesh: BpfMesh, pod: BedPod) -> None:
    (BPFFS / "node" / "connect4").unlink()


def _remove_a_map_pin(mesh: BpfMesh, pod: BedPod) -> None:
    (BPFFS / "node" / "listeners").unlink()


def _remove_the_steering_program(mesh: BpfMesh, pod: BedPod) -> None:
    (BPFFS / "node" / LOOKUP.map).unlink()


def _remove_the_guard_program(mesh: BpfMesh, pod: BedPod) -> None:
    (BPFFS / "node" / GUARD.map).unlink()


def _remove_what_guards_share(mesh: BpfMesh, pod: BedPod) -> None:
    guard_maps.forget(BPFFS, netns_cookie(pod.netns, mesh.site.cgroup))


@pytest.mark.parametrize(
    ("damage", "kinds"),
    [
        (_remove_gate, {"bpf-gate"}),
        (_remove_addresses, {"bpf-address"}),
        (_remove_devices, {"bpf-device"}),
        (_remove_dns_gate, {"bpf-dns-gate"}),
        (_remove_steering, {"bpf-sk-lookup"}),
        (_remove_a_link, {"bpf-node"}),
        (_remove_slots, {"bpf-node", "bpf-dns-slots"}),
        (_remove_a_map_pin, {"bpf-node"}),
        (_remove_the_steering_program, {"bpf-node", "bpf-sk-lookup"}),
        (_remove_the_guard_program, {"bpf-node", "bpf-guard"}),
        (_remove_what_guards_share, {"bpf-guarded"}),
    ],
    ids=lambda value: getattr(value, "__name__", "").lstrip("_"),
)
def test_damage_is_found_and_repaired(
    bed: Bed,
    pair: tuple[BedPod, BedPod],
    damage: Callable[[BpfMesh, BedPod], None],
    kinds: set[str],
) -> None:
    """Each step notices what somebody removed; applied again it restores the capture."""
    a, c = pair[0], bed.pod("c")
    serve(c)
    with BpfMesh(bed, *pair) as mesh:
        damage(mesh, a)
        steps = mesh.recorded["a"]
        assert {s.kind for s in steps if s.missing(target(a))} == kinds

        for pod in pair:
            mesh.recorded[pod.name] = runner.apply_stages(target(pod), mesh.recorded[pod.name])

        assert runner.verify(target(a), mesh.recorded["a"]) == []
        assert a.run(apps.request, at(c, "v4"), b"again").data == b"again"
        assert [(s.pod, s.port) for s in mesh.intercepted()] == [("a", 15001)]


def test_the_programs_are_shared(node: NodePrograms) -> None:
    """A second pod reuses the links of the first; the last one takes everything along."""
    node.claim("one", Constants())
    first = links_on(node.cgroup, node.proxy_cgroup)
    node.claim("two.with.dots", Constants())

    assert links_on(node.cgroup, node.proxy_cgroup) == first
    on_proxy = sum(hook.place is Place.PROXY for hook in HOOKS)
    assert len(links_on(node.proxy_cgroup)) == on_proxy
    assert len(links_on(node.cgroup)) == len(HOOKS) - on_proxy
    pins = {path.name for path in node.directory.iterdir()}
    assert pins == {*MAPS, *(hook.pin for hook in HOOKS)}

    node.release("one")
    assert links_on(node.cgroup, node.proxy_cgroup) == first
    node.release("two.with.dots")
    assert links_on(node.cgroup) == set()
    assert not BPFFS.exists()
    assert not node.proxy_cgroup.exists()


def test_programs_of_another_cgroup_are_an_error(node: NodePrograms) -> None:
    """One node has one --cgroup: a second one is refused with both names, and harms nothing."""
    node.claim("one", Constants())
    other = NodePrograms(BPFFS, node.cgroup.parent / "apps")

    with pytest.raises(PyambientError) as refused:
        other.claim("two", Constants())

    assert f"serve {node.cgroup}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert node.missing("one") is None
    assert "serve" in (other.missing("one") or "")
    assert not (node.cgroup.parent / "apps" / "pyambient-proxy").exists()


def test_a_cgroup_made_again_is_attached_again(node: NodePrograms) -> None:
    """Links die with the proxy's cgroup; a claim finds that and links to the one that is there."""
    node.claim("one", Constants())
    node.proxy_cgroup.rmdir()
    assert "sock" in (node.missing("one") or "")

    node.claim("one", Constants())

    assert node.missing("one") is None
    assert len(links_on(node.proxy_cgroup)) == 2


def test_rests_of_a_killed_process_go(node: NodePrograms) -> None:
    """What was pinned by somebody who never claimed it is replaced, not trusted."""
    (BPFFS / "building").mkdir(parents=True)
    (BPFFS / "node").mkdir()
    with load("bind") as rest, rest.maps()["pods"] as pods:
        pods.pin(BPFFS / "node" / "pods")
        stale = pods.identifier

    node.claim("one", Constants())

    assert node.missing("one") is None
    assert not (BPFFS / "building").exists()
    with node_map(BPFFS, "pods") as pods:
        assert pods.identifier != stale


def test_another_tools_connect_hook_is_refused(node: NodePrograms, tmp_path: Path) -> None:
    """A program that may rewrite connects first is an error that names it; nothing is left."""
    fd = os.open(node.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    with (
        foreign_program(tmp_path) as program,
        Link.create(program, fd, AttachType.CONNECT4),
        pytest.raises(PyambientError, match=r"cil_sock4_conn.*--backend iptables"),
    ):
        node.claim("one", Constants())
    os.close(fd)

    assert not BPFFS.exists()
    assert not node.proxy_cgroup.exists()


def test_two_processes_that_claim_at_once(bed: Bed, node: NodePrograms) -> None:
    """Any number of enrolments at the same time end up with one set of programs."""

    def claim(_: Channel, uid: str) -> None:
        node.claim(uid, Constants())

    children = [bed.node.spawn(claim, f"pod-{n}", uid=0, gid=0) for n in range(8)]
    for child in children:
        child.wait()

    assert len(list((BPFFS / "pods").iterdir())) == 8
    assert len(links_on(node.cgroup, node.proxy_cgroup)) == len(HOOKS)
    assert node.missing("pod-0") is None


def test_bpf_without_a_cgroup(tmp_path: Path) -> None:
    """A node without cgroup2 cannot have this backend, and is told what to do."""
    with pytest.raises(PyambientError, match=r"cgroup2 is not mounted; .*iptables"):
        Bpf(Site(tmp_path, tmp_path, None), Constants())


def test_a_pin_directory_that_cannot_be(bed: Bed, tmp_path: Path) -> None:
    """No bpffs at the given place, and none can be mounted there: one line, no trace."""
    pod = bed.pod("a")
    cgroup = str(bed.cgroup.path)
    step = NodeStep(str(tmp_path / "no" / "such" / "pins"), cgroup, True, True, cgroup, 1)

    with pytest.raises(PyambientError, match=r"no BPF file system.*mount -t bpf"):
        step.apply(target(pod))
