"""Which pods reach one another without a tunnel: those that no address can be mistaken for."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from pyambient.mesh.route import Tunnel, decide_outbound
from pyambient.model.address import SocketAddress
from pyambient.netns import Netns
from pyambient.proxy.neighbours import Neighbours
from pyambient.proxy.worker import PodScope
from pyambient.zds.details import PodDetails

from .rig import proxied

PODS = {
    "client": ("10.1.0.1", "fd01::1"),
    "server": ("10.1.0.2", "fd01::2"),
    "twin": ("10.1.0.9",),
    "other": ("10.1.0.9", "fd01::9"),
}


def scopes_of(rig: Any, bed: Any) -> dict[str, PodScope]:
    """A published pod each, known to the mesh by its addresses."""
    made = {}
    for name, addresses in PODS.items():
        pod = bed.pod(name)
        scope = PodScope(rig.worker, rig.ref(pod), Netns.open(name), PodDetails("bpf", addresses))
        rig.worker.view.publish(scope.published())
        made[name] = scope
    return made


def route(scope: PodScope, ip: str) -> Tunnel:
    own = scope.workload()
    assert own is not None
    found = decide_outbound(scope.worker.view.snapshot, own, SocketAddress(ip, 80))
    assert isinstance(found, Tunnel)
    return found


CASES = [
    ("10.1.0.1", "10.1.0.2", "server"),
    ("fd01::1", "fd01::2", "server"),
    ("10.1.0.1", "10.1.0.1", "client"),
    ("10.1.0.7", "10.1.0.2", None),  # an address that the client's pod does not have
    ("10.1.0.2", "10.1.0.2", None),  # one that another pod has
    ("127.0.0.1", "10.1.0.2", None),
    ("fd01::1", "10.1.0.2", None),  # the app would not see the client's address
    ("10.1.0.1", "10.1.0.9", None),  # two pods have it
    ("fd01::1", "fd01::9", "other"),
]


def test_the_short_way_is_for_what_is_beyond_doubt(bed, tmp_path):
    async def test(rig):
        scopes = scopes_of(rig, bed)
        neighbours, client = Neighbours(), scopes["client"]
        for scope in scopes.values():
            neighbours.note(scope)
        for source, to, expected in CASES:
            reached = neighbours.reached(client, SocketAddress(source, 40000), route(client, to))
            assert (reached and reached.pod.name) == expected, (source, to)
        for scope in scopes.values():
            scope.netns.close()

    proxied(bed, tmp_path, test)


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_pod_that_takes_no_connections_is_no_neighbour(bed, tmp_path, who):
    """Draining, or gone: as a source it has no short way either."""

    async def test(rig):
        scopes = scopes_of(rig, bed)
        neighbours, client = Neighbours(), scopes["client"]
        for scope in scopes.values():
            neighbours.note(scope)
        there, peer = route(client, "10.1.0.2"), SocketAddress("10.1.0.1", 40000)
        assert neighbours.reached(client, peer, there) is scopes["server"]
        neighbours.forget(scopes[who])
        assert neighbours.reached(client, peer, there) is None
        neighbours.note(scopes[who])
        assert neighbours.reached(client, peer, there) is scopes["server"]
        for scope in scopes.values():
            scope.netns.close()

    proxied(bed, tmp_path, test)


def test_a_waypoint_and_another_workload_are_reached_by_tunnel(bed, tmp_path):
    """A waypoint judges first; an address may stand for a workload that is not the pod."""

    async def test(rig):
        scopes = scopes_of(rig, bed)
        neighbours, client = Neighbours(), scopes["client"]
        for scope in scopes.values():
            neighbours.note(scope)
        there, peer = route(client, "10.1.0.2"), SocketAddress("10.1.0.1", 40000)
        by_waypoint = dataclasses.replace(there, target=None)
        stranger = dataclasses.replace(there, workload=scopes["other"].published())
        assert neighbours.reached(client, peer, there) is scopes["server"]
        assert neighbours.reached(client, peer, by_waypoint) is None
        assert neighbours.reached(client, peer, stranger) is None
        for scope in scopes.values():
            scope.netns.close()

    proxied(bed, tmp_path, test)
