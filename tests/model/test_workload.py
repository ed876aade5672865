"""What workloads and services say of themselves."""

from __future__ import annotations

import pytest

from pyambient.model.workload import (
    GatewayAddress,
    IpFamilies,
    NamespacedHostname,
    NetworkAddress,
    Service,
    Visibility,
    Workload,
)


@pytest.mark.parametrize(
    ("families", "ipv4", "ipv6"),
    [
        (IpFamilies.AUTOMATIC, True, True),
        (IpFamilies.DUAL, True, True),
        (IpFamilies.IPV4, True, False),
        (IpFamilies.IPV6, False, True),
    ],
)
def test_ip_families(families, ipv4, ipv6):
    """A service of one family uses no endpoint address of the other."""
    assert families.accepts("10.0.0.1") is ipv4
    assert families.accepts("fd00::1") is ipv6


def test_visibility():
    """A service of namespace visibility is seen from its own namespace only."""
    public = Service("s", "a", "s.a", (), {})
    private = Service("s", "a", "s.a", (), {}, visibility=Visibility.NAMESPACE)
    assert public.visible_to("b")
    assert private.visible_to("a")
    assert not private.visible_to("b")


def test_names():
    """Keys and addresses print in the form that files and logs use."""
    assert str(Service("s", "a", "s.a.svc", (), {})) == "a/s.a.svc"
    assert str(GatewayAddress(NetworkAddress("n", "10.0.0.1"), 15008)) == "n/10.0.0.1"
    assert str(GatewayAddress(NamespacedHostname("a", "s.a.svc"), 15008)) == "a/s.a.svc"


def test_workload_identity():
    """A workload's identity is its trust domain, namespace and service account."""
    workload = Workload("uid", "w", "ns", "sa", "td")
    assert str(workload.identity) == "spiffe://td/ns/ns/sa/sa"
    assert str(workload) == "ns/w"
