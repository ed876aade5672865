"""How the proxy finds out whom a DNS query was meant for."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from pyambient.errors import PyambientError
from pyambient.intercept.ctnetlink import Conntrack
from pyambient.intercept.original_dns import bpf_resolvers, conntrack_resolvers, slot_number
from pyambient.model.numbers import DNS_SLOT_COUNT, DNS_SLOTS_V4, DNS_SLOTS_V6
from tests.bed import Bed


@pytest.mark.parametrize(
    ("ip", "number"),
    [
        ("127.53.0.0", 0),
        ("127.53.3.255", 1023),
        ("127.53.4.0", None),
        ("127.52.255.255", None),
        ("10.77.0.2", None),
        ("100::53:0", 0),
        ("100::53:3ff", 1023),
        ("100::53:400", None),
        ("::1", None),
        ("fe80::1%2", None),
    ],
)
def test_the_number_of_a_slot(ip: str, number: int | None) -> None:
    """An address within the slots of its family is the slot of that number, any other is none."""
    assert slot_number(ip) == number


def test_the_hooks_know_the_same_slots() -> None:
    """The addresses in C are the ones in Python."""
    source = Path(__file__, "../../../bpf/dns.bpf.c").resolve().read_text()
    found = {n: int(v, 0) for n, v in re.findall(r"#define (\w*SLOTS|IPV6_PREFIX)\s+(\w+)", source)}

    assert found["SLOTS"] == DNS_SLOT_COUNT
    assert IPv4Address(found["IPV4_SLOTS"]) == IPv4Address(DNS_SLOTS_V4)
    ipv6 = found["IPV6_PREFIX"] << 96 | found["IPV6_SLOTS"]
    assert IPv6Address(ipv6) == IPv6Address(DNS_SLOTS_V6)


def test_a_pod_without_programs_has_no_resolvers(tmp_path: Path) -> None:
    """Where the map is not pinned the error says so in a line."""
    with pytest.raises(PyambientError, match=r"BPF map .*/node/resolvers is gone; enrol"):
        bpf_resolvers(tmp_path, 1)


def test_conntrack_knows_no_such_flow(bed: Bed, family: str) -> None:
    """A query that no rule redirected has no resolver, whatever address it claims."""
    pod = bed.pod("a")
    lookup = conntrack_resolvers(pod.netns)

    assert lookup.resolver((pod.address(family), 40000), pod.address(family)) is None
    lookup.close()


def test_a_namespace_without_flows(bed: Bed) -> None:
    """The list of flows of a pod that tracks none is empty."""
    with Conntrack(bed.pod("a").netns) as conntrack:
        assert conntrack.entries(2) == conntrack.entries(10) == []
