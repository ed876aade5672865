"""Routes and rules as the kernel takes them, shows them and follows them."""

from __future__ import annotations

import pytest

from pyambient.intercept.fib import Route, Rule, UnreachableRule, delivery, foreign
from pyambient.intercept.interface import Pod, Stage, from_record, to_record
from pyambient.intercept.runner import StepFailed, apply_stages, undo_stages, verify
from pyambient.intercept.survey import survey
from tests.bed import Bed, BedPod, Network, kernel_state

ELSEWHERE = {"v4": "192.0.2.9", "v6": "2001:db8::9"}


def _pod(pod: BedPod) -> Pod:
    return Pod(pod.name, pod.netns)


def _route_of(pod: BedPod, family: str, *words: str) -> str:
    """Where the pod's kernel would send a packet."""
    flag = "-4" if family == "v4" else "-6"
    return pod.command("ip", flag, "route", "get", ELSEWHERE[family], *words)


def test_the_mark_is_delivered_inside_the_pod(bed: Bed, family: str) -> None:
    """Marked, any destination is local by lo, with the pod's address as its source."""
    pod = bed.pod("a")
    assert "via" in _route_of(pod, family, "mark", "0x111")

    apply_stages(_pod(pod), delivery(survey(pod.netns), connects=True))

    marked = _route_of(pod, family, "mark", "0x111")
    assert marked.startswith("local")
    assert "dev lo table 100" in marked
    assert f"src {pod.address(family)}" in marked
    assert "via" in _route_of(pod, family)
    assert "via" in _route_of(pod, family, "mark", "0x539")


def test_a_device_bound_socket_has_its_own_route(bed: Bed, family: str) -> None:
    """Bound to a device, the mark is delivered as well, and lo is preferred without."""
    pod = bed.pod("a")
    apply_stages(_pod(pod), delivery(survey(pod.netns), connects=True))
    bound = _route_of(pod, family, "mark", "0x111", "oif", "eth0")
    assert bound.startswith("local")
    assert "table 100" in bound
    assert f"src {pod.address(family)}" in bound


def test_the_mark_without_a_route_is_a_dead_end(bed: Bed, family: str) -> None:
    """With our routes gone, what is marked does not fall through to the pod's own routes."""
    pod = bed.pod("a")
    steps = apply_stages(_pod(pod), delivery(survey(pod.netns), connects=True))
    undo_stages(_pod(pod), [step for step in steps if isinstance(step, Route)])
    with pytest.raises(RuntimeError, match="Network is unreachable"):
        _route_of(pod, family, "mark", "0x111")
    assert "via" in _route_of(pod, family)


def test_steps_can_be_applied_twice_and_undone_twice(bed: Bed) -> None:
    """Applying is idempotent, undoing too, and the second pod is not touched by either."""
    pod, other = bed.pod("a"), bed.pod("b")
    before = kernel_state(pod, other)
    steps = delivery(survey(pod.netns), connects=True)
    assert len(verify(_pod(pod), steps)) == len(steps)

    for _ in range(2):
        assert apply_stages(_pod(pod), steps) == steps
    assert verify(_pod(pod), steps) == []
    for _ in range(2):
        undo_stages(_pod(pod), steps)

    assert kernel_state(pod, other) == before


def test_replies_need_one_route(bed: Bed) -> None:
    """Where only replies carry the mark, one route and one rule per family do."""
    pod = bed.pod("a")
    assert delivery(survey(pod.netns), connects=False) == (
        Route(False, "lo", pod.ipv4, 100),
        Rule(False),
        Route(True, "lo", pod.ipv6, 100),
        Rule(True),
    )


def test_replies_need_no_source(bed: Bed) -> None:
    """They have one already, so a pod without an address gets its route as well."""
    network = survey(bed.pod("a", ipv4=False, ipv6=False).netns)
    routes = [s for s in delivery(network, connects=False) if isinstance(s, Route)]
    assert [route.source for route in routes] == [None] * len(routes)


def test_a_route_goes_to_the_place_of_another(bed: Bed, family: str) -> None:
    """One of the same metric is exchanged, and undoing what was there before is not needed."""
    pod = bed.pod("a")
    earlier = Route(family == "v6", "lo", None, 100)
    later = Route(family == "v6", "lo", pod.address(family), 100)
    earlier.apply(_pod(pod))
    assert later.takes_over(earlier)
    later.apply(_pod(pod))
    assert later.missing(_pod(pod)) is None
    assert earlier.missing(_pod(pod)) is not None
    later.undo(_pod(pod))
    assert foreign(pod.netns) == []


def test_a_device_without_ipv6_gets_no_ipv6_route(bed: Bed) -> None:
    """The kernel would refuse it, and the last rule makes up for it."""
    pod = bed.pod("a")
    pod.command("sysctl", "-qw", "net.ipv6.conf.lo.disable_ipv6=0")
    bed.add_device(pod, "eth1", bed.add_network(Network("br78", "10.78.0", "fd78::")), ipv6=False)
    pod.command("sysctl", "-qw", "net.ipv6.conf.eth1.disable_ipv6=1")
    steps = apply_stages(_pod(pod), delivery(survey(pod.netns), connects=True))
    assert Route(False, "eth1", "10.78.0.2", 201) in steps
    assert [s.device for s in steps if isinstance(s, Route) and s.ipv6] == ["lo", "eth0"]


def test_a_vanished_device_took_its_routes_along(bed: Bed) -> None:
    """Undoing the route of a device that is gone is no error."""
    pod = bed.pod("a")
    bed.add_device(pod, "eth1", bed.add_network(Network("br78", "10.78.0", "fd78::")))
    steps = apply_stages(_pod(pod), delivery(survey(pod.netns), connects=True))
    pod.ip("link del eth1")
    assert len(verify(_pod(pod), steps)) == 2
    undo_stages(_pod(pod), steps)
    assert foreign(pod.netns) == []


def test_a_route_needs_its_device(bed: Bed) -> None:
    """A device that went away between survey and enrolment is named."""
    pod = bed.pod("a")
    with pytest.raises(StepFailed, match="there is no device eth9"):
        apply_stages(_pod(pod), [Route(False, "eth9", pod.ipv4, 200)])


def test_another_route_of_our_metric_is_an_error(bed: Bed) -> None:
    """IPv4 has one route per metric; another one there is not mistaken for ours."""
    pod = bed.pod("a")
    pod.ip("route add default dev eth0 metric 100 table 100")
    with pytest.raises(FileExistsError):
        Route(False, "lo", None, 100).apply(_pod(pod))
    assert foreign(pod.netns) == ["a route in table 100"]


def test_what_is_not_recorded_is_foreign(bed: Bed) -> None:
    """Our own steps are known by the record; all else in their place is told."""
    pod = bed.pod("a")
    steps = apply_stages(_pod(pod), delivery(survey(pod.netns), connects=True))
    assert foreign(pod.netns, steps) == []
    assert len(foreign(pod.netns, steps[1:])) == 1

    pod.ip("rule add from 192.0.2.0/24 pref 99 lookup 100")
    pod.command("ip", "-6", "rule", "add", "fwmark", "0x7", "pref", "32764", "lookup", "7")
    assert foreign(pod.netns, steps) == [
        "the ip rule pref 99 lookup 100",
        "the ip rule pref 32764 lookup 7",
    ]


def test_steps_survive_the_record(bed: Bed) -> None:
    """Written to disk and read back, the steps are equal."""
    steps = (*delivery(survey(bed.pod("a").netns), connects=True), UnreachableRule(False))
    assert from_record(to_record(steps)) == steps
    assert {step.stage for step in steps} == {Stage.APPLY}
