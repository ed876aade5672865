"""What the agent alone says of a connection, and what it leaves to the proxy."""

from __future__ import annotations

import pytest

from pyambient.agent.explain import DEFAULT_PORT, Inquiry
from pyambient.errors import UsageError
from pyambient.model.address import SocketAddress
from tests.bed import BedPod

from .rig import Rig


@pytest.mark.parametrize(
    ("text", "ip", "port"),
    [
        ("10.0.0.2", "10.0.0.2", DEFAULT_PORT),
        ("10.0.0.2:8080", "10.0.0.2", 8080),
        ("fd00::2", "fd00::2", DEFAULT_PORT),
        ("[fd00::2]", "fd00::2", DEFAULT_PORT),
        ("[FD00::0:2]:443", "fd00::2", 443),
        ("::ffff:10.0.0.2", "10.0.0.2", DEFAULT_PORT),
        ("[fe80::1%2]:80", "fe80::1%2", 80),
    ],
)
def test_a_destination_is_read(text: str, ip: str, port: int) -> None:
    """With and without a port, in the canonical form of all other addresses."""
    assert Inquiry.parse(text).to == SocketAddress(ip, port)


@pytest.mark.parametrize("text", ["", "name:80", "10.0.0.2:", "10.0.0.2:0", "10.0.0.2:123456"])
def test_what_is_no_destination_is_refused(text: str) -> None:
    """A name is none: which address it means is DNS' to say."""
    with pytest.raises(UsageError):
        Inquiry.parse(text)


def outcome(rig: Rig, pod: BedPod, to: str, **more: str) -> tuple[str, str]:
    said = rig.ask("explain", netns=pod.path, to=to, **more)
    return said["outcome"], said["summary"]


def test_a_proxy_that_says_nothing_leaves_it_at_captured(rig: Rig, backend: str) -> None:
    """The agent says how far it knows; without a proxy the connection is refused."""
    rig.start_agent()
    proxy = rig.start_proxy()
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    for pod in (one, two):
        rig.enroll(pod, backend)
    for pod, other in ((one, two), (two, one)):
        for family in ("v4", "v6"):
            to = str(SocketAddress(other.address(family), 8080))
            found, why = outcome(rig, pod, to)
            assert (found, "no proxy of pyambient's says" in why) == ("captured", True)
            own = str(SocketAddress(pod.address(family), 8080))
            assert outcome(rig, pod, own, source=other.address(family))[0] == "captured"
            assert outcome(rig, pod, own)[0] == "direct"
    proxy.kill()
    rig.wait_for_proxies(0)
    assert outcome(rig, one, f"{two.ipv4}:8080")[0] == "refused"
