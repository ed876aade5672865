"""What is told of connections that are refused, dropped or left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.selection import Selection
from pyambient.intercept.trace_reader import TraceReader
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import DNS_PORT, INBOUND_PORT, OUTBOUND_PORT, RESOLVER_PORT
from tests.bed import Bed, Capability, apps
from tests.bed.forging import Forged, send_tcp

from .bpf_mesh import PORT, BpfMesh, at, serve
from .dns_apps import ask, resolve, resolver_at
from .tracing import Told, enrolled, hooks, open_reader, taken, told


@pytest.fixture
def mesh(bed: Bed, bpf_backend: str) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is outside the mesh."""
    with enrolled(bed, bpf_backend) as made:
        yield made


@pytest.fixture
def reader(mesh: BpfMesh) -> Iterator[TraceReader]:
    with open_reader() as opened:
        yield opened


@pytest.mark.usefixtures("kernel")
def test_the_proxy_is_away(mesh: BpfMesh, reader: TraceReader, family: str) -> None:
    """Refused, in both directions, and which listener is missing."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    assert mesh.proxy is not None
    mesh.proxy.child.kill()

    a.run(apps.request, at(c, family))
    events = taken(reader)
    a.run(apps.request, resolver_at(c, family))
    events += taken(reader)
    c.run(apps.request, at(a, family))
    events += taken(reader)

    to_dns = at(c, family, RESOLVER_PORT)
    assert told(mesh, events) == [
        Told("a", "refused", "outbound", at(c, family), OUTBOUND_PORT, "no listener"),
        Told("a", "refused", "outbound", to_dns, DNS_PORT, "no listener"),
        Told("a", "refused", "inbound", at(a, family), INBOUND_PORT, "no listener"),
    ]
    _a_query_without_a_proxy(mesh, reader, family)


def _a_query_without_a_proxy(mesh: BpfMesh, reader: TraceReader, family: str) -> None:
    """With `tc` it is turned round first, and refused where it arrives."""
    a, resolver = mesh.bed.pods["a"], resolver_at(mesh.bed.pods["c"], family)
    a.run(ask, resolver, b"who is it")
    events = taken(reader)
    refused = Told("a", "refused", "outbound", resolver, DNS_PORT, "no listener")
    assert told(mesh, events)[-1] == refused
    assert hooks(events) == (["sendmsg"] if mesh.backend == "bpf" else ["redirect", "arrival"])


def test_what_is_excluded(mesh: BpfMesh, reader: TraceReader, family: str) -> None:
    """By the pod's selection, in both directions, DNS as well."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    serve(a)
    serve(c)
    resolve(c)
    chosen = Selection.from_json({"exclude_ports": f"{PORT},{RESOLVER_PORT}"})
    mesh.options["a"] = CaptureOptions(outbound=chosen, inbound=chosen)
    mesh.refresh(a)

    assert a.run(apps.request, at(c, family)).data == b"hello"
    events = taken(reader)
    assert c.run(apps.request, at(a, family)).data == b"hello"
    events += taken(reader)
    a.run(ask, resolver_at(c, family), b"who is it")
    queries = taken(reader)

    assert told(mesh, events) == [
        Told("a", "excluded", "outbound", at(c, family)),
        Told("a", "excluded", "inbound", at(a, family)),
    ]
    assert told(mesh, queries) == [Told("a", "excluded", "outbound", resolver_at(c, family))]
    assert [event.protocol for event in queries] == ["udp"]


def test_what_a_guard_sees(mesh: BpfMesh, reader: TraceReader, family: str) -> None:
    """Dropped, or let pass and counted, and why."""
    a, c = mesh.bed.pods["a"], mesh.bed.pods["c"]
    segment = Forged(SocketAddress(a.address(family), 4711), at(c, family), payload=b"forged")
    for mode, decision in (("drop", "dropped"), ("count", "counted")):
        mesh.options["a"] = CaptureOptions(guard=mode)
        mesh.refresh(a)
        a.run(send_tcp, segment, capabilities=[Capability.NET_RAW])
        event = taken(reader)[0]  # c answers what arrives there: a reset, of no connection
        assert told(mesh, [event]) == [Told("a", decision, "outbound", at(c, family), 0, "raw")]
        assert event.source == segment.source
        assert event.hook == "guard"
