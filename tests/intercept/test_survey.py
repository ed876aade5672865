"""What a survey finds in a pod, in every shape that addresses and devices come in."""

from __future__ import annotations

from pyambient.intercept.interface import PodAddress, PodNetwork
from pyambient.intercept.survey import survey
from tests.bed import Bed, BedPod, Network


def _addresses(pod: BedPod) -> list[str]:
    return [address.ip for address in survey(pod.netns).addresses if "fe80" not in address.ip]


def test_a_dual_stack_pod(bed: Bed) -> None:
    """Both families of eth0, the link-local one with its scope, and nothing of plain lo."""
    found = survey(bed.pod("a").netns)
    scopes = [address.ip for address in found.addresses if address.ip.startswith("fe80:")]
    assert [ip.partition("%")[2] for ip in scopes] == ["2"]
    assert found.addresses == (
        PodAddress("10.77.0.2", "eth0"),
        PodAddress("fd77::2", "eth0"),
        PodAddress(scopes[0], "eth0"),
    )
    assert (found.devices, found.has_ipv6, found.ipv4_only) == (("eth0",), True, ())
    assert (found.primary(ipv6=False), found.primary(ipv6=True)) == ("10.77.0.2", "fd77::2")


def test_a_pod_without_ipv6(bed: Bed) -> None:
    """IPv6 turned off on every device is no IPv6."""
    found = survey(bed.pod("a", ipv6=False).netns)
    assert found == PodNetwork((PodAddress("10.77.0.2", "eth0"),), ("eth0",), False, ("eth0",))


def test_a_device_without_ipv6(bed: Bed) -> None:
    """IPv6 turned off on one of two devices is told of that one."""
    pod = bed.pod("a")
    bed.add_device(pod, "eth1", bed.add_network(Network("br78", "10.78.0", "fd78::")), ipv6=False)
    pod.command("sysctl", "-qw", "net.ipv6.conf.eth1.disable_ipv6=1")
    found = survey(pod.netns)
    assert (found.devices, found.has_ipv6, found.ipv4_only) == (("eth0", "eth1"), True, ("eth1",))


def test_further_addresses(bed: Bed) -> None:
    """Secondary addresses and those on lo count, 127.0.0.0/8 and ::1 do not."""
    pod = bed.pod("a")
    pod.ip(
        "addr add 10.77.0.99/24 dev eth0",
        "addr add 10.1.1.1/32 dev lo",
        "addr add 127.0.0.53/8 dev lo",
        "addr add fd99::1/128 dev lo",
    )
    assert _addresses(pod) == ["10.1.1.1", "10.77.0.2", "10.77.0.99", "fd99::1", "fd77::2"]
    assert survey(pod.netns).primary(ipv6=False) == "10.77.0.2"


def test_a_point_to_point_address_is_our_end(bed: Bed) -> None:
    """Of an address with a peer, the local one counts in both families."""
    pod = bed.pod("a")
    pod.ip(
        "addr add 192.0.2.1 peer 192.0.2.2/32 dev eth0",
        "addr add 2001:db8::1 peer 2001:db8::2/128 dev eth0 nodad",
    )
    found = _addresses(pod)
    assert {"192.0.2.1", "2001:db8::1"} < set(found)
    assert not {"192.0.2.2", "2001:db8::2"} & set(found)


def test_a_deprecated_address_is_not_the_primary_one(bed: Bed) -> None:
    """A deprecated address is the pod's own, but no source of captured connections."""
    pod = bed.pod("a")
    pod.ip("addr add 2001:db8::1/64 dev eth0 nodad preferred_lft 0")
    found = survey(pod.netns)
    assert found.primary(ipv6=True) == "fd77::2"
    assert found.addresses[-1] == PodAddress("2001:db8::1", "eth0")


def test_a_tentative_address_is_told_apart(bed: Bed) -> None:
    """An address under duplicate address detection is listed, but not among the usable ones."""
    pod = bed.pod("a")
    # Detection cannot end before it has sent its probes, one a minute.
    pod.command("sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1")
    pod.command("sysctl", "-qw", "net.ipv6.neigh.eth0.retrans_time_ms=60000")
    pod.ip("addr add fd77::99/64 dev eth0")
    found = survey(pod.netns)
    assert found.tentative == (PodAddress("fd77::99", "eth0"),)
    assert "fd77::99" not in _addresses(pod)


def test_a_refused_address_is_left_out(bed: Bed) -> None:
    """An address that another host has already is neither usable nor awaited."""
    pod = bed.pod("a")
    bed.node.ip("addr add fd77::99/64 dev br77 nodad")
    pod.command("sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=1")
    pod.ip("addr add fd77::99/64 dev eth0")
    pod.command("sh", "-ec", "until ip -6 addr show dadfailed | grep -q fd77; do sleep 0.1; done")
    found = survey(pod.netns)
    assert "fd77::99" not in [address.ip for address in found.addresses + found.tentative]


def test_a_device_that_is_down_is_left_out(bed: Bed) -> None:
    """A device that is down carries nothing, and no route can name it."""
    pod = bed.pod("a")
    bed.add_device(pod, "eth1", bed.add_network(Network("br78", "10.78.0", "fd78::")))
    pod.ip("link set eth1 down")
    assert survey(pod.netns).devices == ("eth0",)
    assert "10.78.0.2" not in _addresses(pod)
