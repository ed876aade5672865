"""What others send through a pod, a virtual machine's traffic for example, with netfilter."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from pyambient.intercept.interface import Interceptor
from pyambient.intercept.options import CaptureOptions
from pyambient.model.numbers import INBOUND_PORT, OUTBOUND_PORT
from tests.bed import Bed, BedPod, Network, apps, changes, kernel_state

from .bpf_mesh import at, serve
from .netfilter_mesh import INTERCEPTORS, NetfilterMesh


@pytest.fixture(params=[*INTERCEPTORS])
def interceptor(request: pytest.FixtureRequest) -> Interceptor:
    """Every netfilter backend, and of iptables each variant."""
    return INTERCEPTORS[request.param]


@dataclass(frozen=True, slots=True)
class _Place:
    """Pod a with a guest behind its device tap0, another pod, and a server outside of both."""

    a: BedPod
    b: BedPod
    guest: BedPod
    outside: BedPod


@pytest.fixture
def place(bed: Bed) -> _Place:
    a, b, outside = bed.pod("a"), bed.pod("b"), bed.pod("outside")
    inner = bed.add_network(Network("br-tap", "10.99.0", "fd99::", node_is_router=False))
    ipv4, ipv6 = bed.add_device(a, "tap0", inner)
    guest = bed.pod("guest", network=inner)
    guest.ip(f"route add default via {ipv4}", f"route add ::/0 via {ipv6}")
    serve(outside)
    return _Place(a, b, guest, outside)


def _mesh(bed: Bed, place: _Place, interceptor: Interceptor, **options: object) -> NetfilterMesh:
    mesh = NetfilterMesh(bed, place.a, place.b, interceptor=interceptor)
    mesh.options["a"] = CaptureOptions.from_json(options)
    return mesh


def test_a_guest_is_captured(
    bed: Bed, place: _Place, interceptor: Interceptor, family: str
) -> None:
    """Its connections go to the outbound listener with their true destination, and nowhere else."""
    chosen = {"virtual_interfaces": "tap0"}
    before = kernel_state(place.a, place.b)
    with _mesh(bed, place, interceptor, **chosen) as mesh:
        destination = at(place.outside, family)
        exchange = place.guest.run(apps.request, destination, b"guest")
        assert (exchange.data, exchange.errno) == (b"guest", None)
        (seen,) = mesh.intercepted()
        assert (seen.pod, seen.port, seen.original) == ("a", OUTBOUND_PORT, destination)
        assert seen.peer == exchange.local

        serve(place.a)
        assert place.outside.run(apps.request, at(place.a, family), b"in").data == b"in"
        assert [s.port for s in mesh.intercepted()] == [OUTBOUND_PORT, INBOUND_PORT]
    lines = changes(before, kernel_state(place.a, place.b))
    assert [line for line in lines if "iptables" not in line or "ISTIO_" in line] == []


def test_without_the_option_a_guest_comes_in(
    bed: Bed, place: _Place, interceptor: Interceptor, family: str
) -> None:
    """What comes by the device is inbound, as by every other."""
    with _mesh(bed, place, interceptor) as mesh:
        serve(place.a)
        assert place.guest.run(apps.request, at(place.a, family), b"in").data == b"in"
        assert [seen.port for seen in mesh.intercepted()] == [INBOUND_PORT]
