"""Look-ups in the mesh at one moment."""

from __future__ import annotations

import ipaddress

import pytest

from pyambient.mesh.snapshot import Snapshot
from pyambient.model.policy import Scope
from pyambient.model.workload import (
    NetworkAddress,
    NetworkCidr,
    TunnelProtocol,
    Visibility,
)
from tests.mesh.build import behind, gateway, policy, service, workload

VIP = "10.96.0.1"


def test_workload_by_address_and_uid():
    """A workload is found by each of its addresses, in its network, and by its uid."""
    here = workload("a", "10.0.0.1", "fd00::1")
    there = workload("b", "10.0.0.1", network="remote")
    snapshot = Snapshot([here, there])
    assert snapshot.workload_by_address("", "10.0.0.1") is here
    assert snapshot.workload_by_address("", "fd00::1") is here
    assert snapshot.workload_by_address("remote", "10.0.0.1") is there
    assert snapshot.workload_by_address("remote", "fd00::1") is None
    assert snapshot.workload_by_uid(here.uid) is here
    assert snapshot.workload_by_uid("other") is None


def test_host_network_is_not_found_by_address():
    """A host-network workload shares the node's address, which says nothing about it."""
    node = workload("node-agent", "10.0.0.9", host_network=True)
    snapshot = Snapshot([node])
    assert snapshot.workload_by_address("", "10.0.0.9") is None
    assert snapshot.workload_by_uid(node.uid) is node


def test_shared_address():
    """The first of several workloads with one address wins it, and that is said."""
    first, second = workload("a", "10.0.0.1"), workload("b", "10.0.0.1")
    snapshot = Snapshot([first, second])
    assert snapshot.workload_by_address("", "10.0.0.1") is first
    assert snapshot.workload_by_uid(second.uid) is second
    assert len(snapshot.warnings) == 1
    assert snapshot.warnings[0].startswith("address 10.0.0.1 belongs to default/a (")
    assert snapshot.warnings[0].endswith(f"({second.uid}): look-ups by address give default/a")


def test_own_workload():
    """An enrolled pod is what stands for it in the mesh, or itself."""
    enrolled = workload("netns", "10.0.0.1", uid="u1")
    described = workload("server", "10.0.0.1")
    assert Snapshot().own_workload(enrolled) is enrolled
    assert (
        Snapshot([described], also_known_as={"u1": described}).own_workload(enrolled) is described
    )


NEAR = service("near", VIP, namespace="client-ns", hostname="s")
CANONICAL = service("canonical", VIP, namespace="b", hostname="s", canonical=True)
PLAIN = service("plain", VIP, namespace="a", hostname="s")
PRIVATE = service("private", VIP, namespace="p", hostname="s", visibility=Visibility.NAMESPACE)


@pytest.mark.parametrize(
    ("services", "expected"),
    [
        ([PLAIN], PLAIN),
        ([PLAIN, CANONICAL], CANONICAL),
        ([PLAIN, CANONICAL, NEAR], NEAR),
        ([PRIVATE], None),
        ([PRIVATE, PLAIN], PLAIN),
        ([], None),
    ],
)
def test_best_service(services, expected):
    """Of several services with one VIP or name: own namespace, canonical, first; if visible."""
    snapshot = Snapshot(services=services)
    assert snapshot.service_by_address("", VIP, "client-ns") is expected
    assert snapshot.service_by_hostname("S", "client-ns") is expected


def test_private_service_in_its_namespace():
    """A service of namespace visibility is found from there."""
    snapshot = Snapshot(services=[PRIVATE])
    assert snapshot.service_by_address("", VIP, "p") is PRIVATE


def ranged(name, *ranges, **fields):
    """A service with VIP ranges in the one network."""
    cidrs = tuple(NetworkCidr("", ipaddress.ip_network(r)) for r in ranges)
    return service(name, cidr_vips=cidrs, **fields)


WIDE = ranged("wide", "10.96.0.0/16", "fd00::/64")
NARROW = ranged("narrow", "10.96.0.0/24", namespace="other")
OWN = ranged("own", "10.0.0.0/8", namespace="client-ns")


@pytest.mark.parametrize(
    ("services", "ip", "expected"),
    [
        ([WIDE], "10.96.1.1", WIDE),
        ([WIDE], "fd00::7", WIDE),
        ([WIDE], "10.97.0.1", None),
        ([WIDE, NARROW], "10.96.0.7", NARROW),
        ([WIDE, NARROW], "10.96.1.7", WIDE),
        ([WIDE, NARROW, OWN], "10.96.0.7", OWN),
        ([WIDE, NARROW, OWN, PLAIN], VIP, PLAIN),
        ([WIDE, PRIVATE], VIP, WIDE),
    ],
)
def test_ranges(services, ip, expected):
    """Ranges answer where no single visible VIP does: own namespace, then the longest prefix."""
    assert Snapshot(services=services).service_by_address("", ip, "client-ns") is expected


def test_ranges_stay_in_their_network():
    """A range of one network does not answer for another."""
    assert Snapshot(services=[WIDE]).service_by_address("remote", "10.96.1.1", "x") is None


def test_vips_stay_in_their_network():
    """A VIP of one network does not answer for another."""
    remote = service("r", vips=(NetworkAddress("remote", VIP),))
    snapshot = Snapshot(services=[remote])
    assert snapshot.service_by_address("", VIP, "default") is None
    assert snapshot.service_by_address("remote", VIP, "default") is remote


def test_endpoints():
    """A service's endpoints are the workloads that name it; those of unknown services wait."""
    one, other = service("one", VIP), service("other")
    a = workload("a", "10.0.0.1", services=behind(one))
    b = workload("b", "10.0.0.2", services=behind(one, other))
    snapshot = Snapshot([a, b], [one])
    assert snapshot.endpoints(one) == (a, b)
    assert snapshot.endpoints(service("nobody's")) == ()
    assert snapshot.services_of(b) == (one,)
    assert snapshot.service(one.key) is one


def test_gateway_by_address_and_name():
    """A waypoint's destination names a service first, then a workload."""
    waypoint = service("waypoint", VIP)
    instance = workload("w-1", "10.0.0.5", hostname="w-1.example", services=behind(waypoint))
    snapshot = Snapshot([instance], [waypoint])
    by_name = gateway(f"default/{waypoint.hostname}")
    assert snapshot.gateway(by_name, "default") is waypoint
    assert snapshot.gateway_instances(by_name, "default") == (instance,)
    assert snapshot.gateway(gateway(f"/{VIP}"), "default") is waypoint
    assert snapshot.gateway(gateway("/10.0.0.5"), "default") is instance
    assert snapshot.gateway(gateway("default/w-1.example"), "default") is instance
    assert snapshot.gateway_instances(gateway("/10.0.0.5"), "default") == (instance,)
    assert snapshot.gateway(gateway("default/none"), "default") is None
    assert snapshot.gateway_instances(gateway("default/none"), "default") == ()


def test_policies_of_a_workload():
    """Global policies, those of the namespace and those named apply, each once."""
    everywhere = policy("everywhere", namespace="istio-system", scope=Scope.GLOBAL)
    near = policy("near")
    far = policy("far", namespace="other")
    chosen = policy("chosen", scope=Scope.WORKLOAD_SELECTOR)
    unchosen = policy("unchosen", scope=Scope.WORKLOAD_SELECTOR)
    picky = workload("a", policies=("default/chosen", "default/near"))
    snapshot = Snapshot([picky], policies=[far, chosen, near, everywhere, unchosen])
    assert snapshot.policies_for(picky) == (everywhere, near, chosen)
    assert snapshot.policies_for(workload("b")) == (everywhere, near)
    assert snapshot.policies_for(workload("c", namespace="other")) == (everywhere, far)
    assert snapshot.warnings == ()


def test_unknown_policy():
    """A policy that is named and not defined is skipped, and both the mesh and its user hear it."""
    trusting = workload("a", policies=("default/gone",))
    snapshot = Snapshot([trusting], policies=[policy("near")])
    assert [p.name for p in snapshot.policies_for(trusting)] == ["near"]
    assert snapshot.unknown_policies(trusting) == ("default/gone",)
    assert snapshot.unknown_policies(workload("b")) == ()
    assert snapshot.warnings == (
        "workload default/a names policy 'default/gone', which is not defined: it is skipped",
    )


def test_repr():
    """A snapshot says how much is in it."""
    plain = workload("a", protocol=TunnelProtocol.NONE)
    assert repr(Snapshot([plain])) == "<Snapshot 1 workloads, 0 services, 0 policies>"
