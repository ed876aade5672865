"""Pods with a second device, which comes after the enrolment."""

from __future__ import annotations

import pytest

from tests.bed import Bed, ClientOptions, Network, apps

from .bpf_mesh import BpfMesh, at, serve

pytestmark = pytest.mark.usefixtures("kernel")


def test_a_device_that_comes_later(bed: Bed, family: str) -> None:
    """A socket bound to a new device gets nothing out until the refresh, and is captured then."""
    second = bed.add_network(Network("br78", "10.78.0", "fd78::"))
    a, b, peer = bed.pod("a"), bed.pod("b"), bed.pod("peer", network=second)
    echo = serve(peer)
    by_device = ClientOptions(device="eth1", timeout=2)
    with BpfMesh(bed, a, b) as mesh:
        addresses = bed.add_device(a, "eth1", second)

        early = a.run(apps.request, at(peer, family), b"early", by_device)
        assert (early.failed, echo.ask("accepted")) == (True, [])

        mesh.refresh(a)
        late = a.run(apps.request, at(peer, family), b"late", by_device)

        assert (late.data, late.errno) == (b"late", None)
        assert late.local.ip in addresses
        assert [s.original for s in mesh.intercepted()] == [at(peer, family)]
