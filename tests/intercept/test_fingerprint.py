"""A fingerprint is another one exactly when a step it tells about may be lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyambient.intercept.fingerprint import fingerprint, tells
from pyambient.intercept.interface import Step
from pyambient.intercept.runner import verify
from pyambient.model.address import SocketAddress
from tests.bed import Bed, BedPod, apps

from .netfilter_mesh import INTERCEPTORS, NetfilterMesh, target


@pytest.fixture(params=list(INTERCEPTORS))
def netfilter(request: pytest.FixtureRequest, bed: Bed) -> Iterator[tuple[BedPod, list[Step]]]:
    """An enrolled pod and those of its steps that a fingerprint tells about; another beside it."""
    pod, other = bed.pod("a"), bed.pod("b")
    with NetfilterMesh(bed, pod, other, interceptor=INTERCEPTORS[request.param]) as mesh:
        yield pod, [step for step in mesh.recorded["a"] if tells(step)]


def test_what_is_lost_shows(netfilter: tuple[BedPod, list[Step]]) -> None:
    """Each step that is undone changes it, and each that is applied again."""
    pod, steps = netfilter
    assert steps
    for step in reversed(steps):
        before = fingerprint(pod.netns, steps)
        step.undo(target(pod))
        if not verify(target(pod), [step]):
            continue  # nothing of it was there to be lost
        undone = fingerprint(pod.netns, steps)
        assert undone != before, step
        step.apply(target(pod))
        assert verify(target(pod), [step]) == []
        assert fingerprint(pod.netns, steps) != undone, step


def test_traffic_and_other_routes_do_not_show(netfilter: tuple[BedPod, list[Step]]) -> None:
    """Packets that rules count, a route of the pod's own and the look itself change nothing."""
    pod, steps = netfilter
    before = fingerprint(pod.netns, steps)
    other = pod.bed.pods["b"]
    echo = other.spawn(apps.echo_server, 8080)
    assert echo.receive() == "listening"
    for address in (other.ipv4, other.ipv6):
        there = SocketAddress(str(address), 8080)
        assert pod.run(apps.request, there).data == b"hello"
    pod.ip("route add 198.51.100.0/24 dev eth0")
    for _ in range(3):
        assert fingerprint(pod.netns, steps) == before


def test_a_changed_rule_of_the_same_size_shows(netfilter: tuple[BedPod, list[Step]]) -> None:
    """It is what the rules say that counts, not how many there are."""
    pod, steps = netfilter
    if any(step.kind.startswith("nftables") for step in steps):
        change = ("nft", "insert", "rule", "ip", "pyambient", "outbound", "counter")
    else:
        variant = "legacy" if pod.command("iptables-legacy-save") else "nft"
        tool = f"iptables-{variant}"
        place = ("-t", "nat", "-R", "ISTIO_OUTPUT", "1", "-p", "tcp")
        change = (tool, *place, "-d", "192.0.2.7", "-j", "ACCEPT")
    before = fingerprint(pod.netns, steps)
    pod.command(*change)
    assert fingerprint(pod.netns, steps) != before
