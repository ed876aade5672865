"""What the agent alone says of a connection, and what it leaves to the proxy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pyambient.agent.explain import DEFAULT_PORT, Inquiry
from pyambient.errors import UsageError
from pyambient.intercept.interface import Pod
from pyambient.intercept.tc_steps import Redirect
from pyambient.model.address import SocketAddress
from tests.bed import BedPod, ClientOptions, apps

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


def _enrolled_with_tc(rig: Rig) -> tuple[BedPod, BedPod, BedPod]:
    """Two pods that are enrolled and one that is not, whom nobody looks at in the meantime."""
    rig.settings = replace(rig.settings, round_pause=60)
    rig.start_agent()
    rig.start_proxy()
    pods = rig.bed.pod("one"), rig.bed.pod("two"), rig.bed.pod("outside")
    for pod in pods[:2]:
        rig.enroll(pod, "tc")
    return pods


def _told_and_seen(rig: Rig, client: BedPod, server: BedPod, family: str, device: str) -> list[str]:
    """What is said of a connection, and what becomes of it: an answer, none, or no connection.

    Who is captured has none: the rig's proxy takes connections and answers nothing.
    """
    to = SocketAddress(server.address(family), 8080)
    exchange = client.run(apps.request, to, b"x", ClientOptions(device=device or None, timeout=2))
    seen = "direct" if exchange.data else "refused" if exchange.stage == "connect" else "captured"
    return [outcome(rig, client, str(to), device=device)[0], seen]


@pytest.mark.parametrize(
    ("device", "expected"), [("", "captured"), ("eth0", "captured"), ("lo", "refused")]
)
def test_tc_captures_by_the_device(rig: Rig, family: str, device: str, expected: str) -> None:
    """A bound socket like any other, but for lo, by which nothing gets to others."""
    one, two, _ = _enrolled_with_tc(rig)
    for client, server in ((one, two), (two, one)):
        with server.spawn(apps.echo_server, 8080) as echo:
            assert echo.receive() == "listening"
            assert _told_and_seen(rig, client, server, family, device) == [expected] * 2


def test_what_tc_has_no_redirect_for(rig: Rig, family: str) -> None:
    """A device that lost it has its guard; what leaves by one not seen yet is plain and said so."""
    one, two, outside = _enrolled_with_tc(rig)
    record = rig.records()["one"]
    for step in record.steps:
        if isinstance(step, Redirect):
            step.undo(Pod(record.pod.uid, one.netns))
    with outside.spawn(apps.echo_server, 8080) as echo:
        assert echo.receive() == "listening"
        assert _told_and_seen(rig, one, outside, family, "") == ["refused"] * 2
        assert _told_and_seen(rig, two, outside, family, "") == ["captured"] * 2


def test_tc_says_what_becomes_of_dns(rig: Rig, family: str) -> None:
    """It goes to the forwarder."""
    one, two, _ = _enrolled_with_tc(rig)
    said = rig.ask("explain", netns=one.path, to=str(SocketAddress(two.address(family), 53)))
    dns = {finding["rule"]: finding["found"] for finding in said["findings"]}["DNS"]
    assert (said["outcome"], "goes to the proxy's forwarder" in dns) == ("forwarded", True)
