"""The guard on a pod's devices drops what a captured socket sends past lo, and nothing else."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyambient.intercept import runner
from pyambient.intercept.egress_guard import EgressGuard
from pyambient.intercept.kernel_objects import AttachType, Link
from pyambient.model.numbers import PROXY_MARK
from tests.bed import Bed, BedPod, capturing, marking
from tests.bed.snapshot import kernel_state

from .bpf_mesh import PORT, BpfMesh, at, serve, target

_MARKER = b"bytes of a captured socket"


def refuse_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a kernel before 6.6 does."""
    create = Link.create.__func__

    def without_tcx(cls, program, attach_to, attach_type, *, first=False):
        if attach_type in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return create(cls, program, attach_to, attach_type, first=first)

    monkeypatch.setattr(Link, "create", classmethod(without_tcx))


def has_tcx() -> bool:
    """Whether this kernel's own types know tcx."""
    return b"BPF_TCX_EGRESS" in Path("/sys/kernel/btf/vmlinux").read_bytes()


@pytest.fixture(params=["this kernel", "no tcx"])
def by_filter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to attach, where this kernel has both: whether the guard has to be a filter."""
    if request.param == "no tcx":
        refuse_tcx(monkeypatch)
        return True
    return not has_tcx()


@pytest.fixture
def pods(bed: Bed) -> tuple[BedPod, BedPod, BedPod]:
    return bed.pod("a"), bed.pod("b"), bed.pod("outside")


@pytest.fixture
def mesh(bed: Bed, pods, by_filter) -> Iterator[BpfMesh]:
    """Two enrolled pods, and nothing of the guard left when they are freed."""
    before = kernel_state(*pods)
    with BpfMesh(bed, *pods[:2]) as made:
        yield made
    assert kernel_state(*pods) == before


def guards(mesh: BpfMesh, pod: BedPod) -> list[EgressGuard]:
    return [step for step in mesh.recorded[pod.name] if isinstance(step, EgressGuard)]


def change_mark_and_send(destination, mark):
    with socket.socket(destination.family) as client:
        client.settimeout(2)
        client.connect(destination.sockaddr())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.sendall(_MARKER)
        return client.recv(100)


@pytest.mark.parametrize("mark", [PROXY_MARK, 0])
def test_a_captured_socket_cannot_be_freed_by_its_mark(mesh, pods, by_filter, family, mark):
    """The bytes leave by no device; an app without the trick goes on as before."""
    a, _, outside = pods
    able, there = marking(a), at(outside, family)
    with serve(outside), capturing(a) as capture, pytest.raises(TimeoutError):
        a.run(change_mark_and_send, there, mark, capabilities=able)
    assert [str(p) for p in capture.packets if _MARKER in p.payload and PORT in p.ports] == []
    assert [guard.by_filter for guard in guards(mesh, a)] == [by_filter]


def test_sockets_that_are_not_captured_pass(mesh, pods, family):
    """UDP, and a connection that the pod accepted, leave by the guarded device."""
    a, _, outside = pods

    def datagram(to):
        with socket.socket(to.family, socket.SOCK_DGRAM) as sock:
            sock.sendto(_MARKER, to.sockaddr())

    with capturing(outside) as capture:
        a.run(datagram, at(outside, family))
    assert any(_MARKER in packet.payload for packet in capture.packets)
    del mesh


def test_a_lost_guard_is_noticed_and_put_back(mesh, pods):
    a = pods[0]
    (guard,) = guards(mesh, a)
    assert guard.missing(target(a)) is None
    guard.undo(target(a))
    assert guard.missing(target(a)) == "no guard on eth0"
    assert guard.apply(target(a)).missing(target(a)) is None


def test_a_reserved_place_is_no_guard_until_it_is_applied(mesh, pods, family):
    """What holds the place meanwhile is like a lost guard, and exchanged for the real one."""
    a, _, outside = pods
    (guard,) = guards(mesh, a)
    pod = target(a)
    guard.undo(pod)
    guard.reserve(pod)
    assert guard.missing(pod) == "no guard on eth0"
    assert guard.apply(pod).missing(pod) is None
    assert pod.places == {}
    able, there = marking(a), at(outside, family)
    with serve(outside), pytest.raises(TimeoutError):
        a.run(change_mark_and_send, there, PROXY_MARK, capabilities=able)


def test_what_is_reserved_leaves_with_who_reserved_it(mesh, pods, by_filter):
    """Nothing is pinned yet, so an agent that is killed leaves nothing: the fixture looks."""
    a = pods[0]
    (guard,) = guards(mesh, a)
    pod = target(a)
    guard.undo(pod)
    guard.reserve(pod)
    assert guard.missing(pod) == "no guard on eth0"
    assert list(pod.places) == ([] if by_filter else ["guard-eth0"])
    for link in pod.places.values():
        link.close()


def test_a_device_that_comes_later_is_guarded_too(bed, mesh, pods):
    a = pods[0]
    bed.add_device(a, "eth1", bed.network)
    mesh.refresh(a)
    assert [guard.device for guard in guards(mesh, a)] == ["eth0", "eth1"]
    assert runner.verify(target(a), mesh.recorded[a.name]) == []
    a.ip("link del eth1")
    mesh.refresh(a)
    assert [guard.device for guard in guards(mesh, a)] == ["eth0"]


def test_a_filter_of_somebody_else_stays(bed, pods, monkeypatch):
    """A pod may have a clsact qdisc of its own: neither it nor its filters are ours to remove."""
    refuse_tcx(monkeypatch)
    a, b, _ = pods
    a.command("tc", "qdisc", "add", "dev", "eth0", "clsact")
    theirs = ("prio", "7", "bpf", "da", "bytecode", "1,6 0 0 0")
    a.command("tc", "filter", "add", "dev", "eth0", "egress", *theirs)
    before = a.command("tc", "filter", "show", "dev", "eth0", "egress")
    with BpfMesh(bed, a, b):
        assert "pyamb_guard" in a.command("tc", "filter", "show", "dev", "eth0", "egress")
    assert a.command("tc", "filter", "show", "dev", "eth0", "egress") == before
