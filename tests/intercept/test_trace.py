"""What is told of each decision of the backends `bpf` and `tc`: two enrolled pods, one outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyambient.model.address import SocketAddress
from pyambient.model.numbers import (
    DNS_PORT,
    HBONE_PORT,
    INBOUND_PORT,
    OUTBOUND_PORT,
    RESERVED_PORTS,
)
from tests.bed import Bed, CgroupTree, apps

from .bpf_mesh import PORT, BpfMesh, at, serve
from .dns_apps import ask, resolve, resolver_at
from .test_bpf_guard import _bind_all
from .tracing import Told, cookie, enrolled, hooks, open_reader, taken, told


@pytest.fixture(scope="module", params=["bpf", "tc"])
def mesh(request: pytest.FixtureRequest, cgroup_tree: CgroupTree) -> Iterator[BpfMesh]:
    """Pods a and b enrolled, c and d outside, shared by these tests, which change none of them."""
    with Bed(cgroup_tree) as bed, enrolled(bed, request.param) as made:
        bed.pod("d")
        yield made


def test_a_connection_between_pods(mesh: BpfMesh, family: str) -> None:
    """Captured where it leaves, given to a listener where it comes in, then to the app."""
    a, b = mesh.bed.pods["a"], mesh.bed.pods["b"]
    with serve(b), open_reader() as reader:
        exchange = a.run(apps.request, at(b, family))
        events = taken(reader)

    assert told(mesh, events) == [
        Told("a", "captured", "outbound", at(b, family), OUTBOUND_PORT),
        Told("b", "steered", "inbound", at(b, family), INBOUND_PORT),
        Told("b", "delivered", "inbound", at(b, family)),
    ]
    by = "connect" if mesh.backend == "bpf" else "redirect"
    assert hooks(events) == [by, "sk_lookup", "connect"]
    captured, steered, delivered = events
    assert mesh.proxy is not None
    assert delivered.pid == mesh.proxy.child.pid
    assert [e.source and e.source.ip for e in (steered, delivered)] == [a.address(family)] * 2
    if mesh.backend == "tc":
        assert captured.source == exchange.local
    else:
        assert captured.process == delivered.process
        assert captured.pid not in (0, delivered.pid)
    assert [event.protocol for event in events] == ["tcp"] * 3
    assert 0 < captured.at < steered.at < delivered.at


def test_hbone_from_outside(mesh: BpfMesh, family: str) -> None:
    """By its port, to the listener for it."""
    b, c = mesh.bed.pods["b"], mesh.bed.pods["c"]
    with open_reader() as reader:
        c.run(apps.request, at(b, family, HBONE_PORT))
        events = taken(reader)
    to = at(b, family, HBONE_PORT)
    assert told(mesh, events) == [Told("b", "steered", "inbound", to, HBONE_PORT)]


def test_who_is_not_enrolled_is_not_told_of(mesh: BpfMesh, family: str) -> None:
    """Neither are what a pod sends to itself, and its own loopback."""
    a, c, d = (mesh.bed.pods[name] for name in "acd")
    loopback = SocketAddress("127.0.0.1" if family == "v4" else "::1", PORT)
    with serve(a), serve(c), open_reader() as reader:
        assert d.run(apps.request, at(c, family)).data == b"hello"
        assert a.run(apps.request, at(a, family)).data == b"hello"
        assert a.run(apps.request, loopback).data == b"hello"
        assert taken(reader) == []


@pytest.mark.parametrize("how", ["unconnected", "connected"])
def test_a_query(mesh: BpfMesh, family: str, how: str) -> None:
    """The resolver is the one that the app meant; the proxy's own question is no event."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    resolver = resolver_at(c, family)
    with resolve(c), open_reader() as reader:
        a.run(ask, resolver, b"who is it", connected=how == "connected")
        (event,) = events = taken(reader)
    assert told(mesh, events) == [Told("a", "redirected", "outbound", resolver, DNS_PORT)]
    call = "connect" if how == "connected" else "sendmsg"
    assert event.hook == (call if mesh.backend == "bpf" else "redirect")
    assert event.protocol == "udp"


def test_a_health_probe(mesh: BpfMesh, family: str) -> None:
    """Of the node itself: it goes to the app."""
    a = mesh.bed.pods["a"]
    with serve(a), open_reader() as reader:
        assert mesh.bed.node.run(apps.request, at(a, family)).data == b"hello"
        assert told(mesh, taken(reader)) == [Told("a", "probe", "inbound", at(a, family))]


def test_a_reserved_port(mesh: BpfMesh) -> None:
    """Each bind that is refused, with the process that tried; `tc` has no hook there."""
    a = mesh.bed.pods["a"]
    with open_reader() as reader:
        a.run(_bind_all, None)
        events = taken(reader)
    if mesh.backend == "tc":
        assert events == []
        return
    assert {event.reason for event in events} == {"reserved port"}
    assert {event.hook for event in events} == {"bind"}
    assert {event.destination.port for event in events} == set(RESERVED_PORTS)
    assert {event.protocol for event in events} == {"tcp", "udp"}
    assert all(event.pid for event in events)


def test_one_pod_alone(mesh: BpfMesh, family: str) -> None:
    """The programs themselves leave out the others, so that those take no room in the ring."""
    a, b = mesh.bed.pods["a"], mesh.bed.pods["b"]
    with serve(b), open_reader(cookie(mesh, "b")) as reader:
        a.run(apps.request, at(b, family))
        assert [event.pod for event in told(mesh, taken(reader))] == ["b", "b"]


def test_two_readers_see_the_same(mesh: BpfMesh, family: str) -> None:
    """Each has a ring of its own; who comes later sees what comes later."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    with serve(c), open_reader() as reader:
        a.run(apps.request, at(c, family))
        first = taken(reader)
        with open_reader() as other:
            a.run(apps.request, at(c, family))
            both = taken(other)
            assert (len(first), len(both)) == (1, 1)
            assert taken(reader) == both
