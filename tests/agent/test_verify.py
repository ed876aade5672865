"""`verify` passes for a captured pod, and for no other."""

from __future__ import annotations

from typing import Any

import pytest

from pyambient.agent.verify import verify
from tests.bed import BedPod, CgroupTree, Child

from .rig import Rig

IPV4 = "an IPv4 connection of an app reaches the proxy"
IPV6 = "an IPv6 connection of an app reaches the proxy"
STEP = "a step of the enrolment is in place"


@pytest.fixture
def agent(rig: Rig) -> Child:
    return rig.start_agent()


@pytest.fixture
def proxy(rig: Rig, agent: Child) -> Child:
    return rig.start_proxy()


def failures(rig: Rig, pod: BedPod) -> dict[str, str]:
    """{what was checked: what is wrong}, of the checks that failed."""
    checks: list[dict[str, Any]] = rig.ask("verify", netns=pod.path)
    return {check["what"]: check["problem"] for check in checks if check["problem"]}


def failures_without_agent(rig: Rig, pod: BedPod) -> dict[str, str]:
    """The same, of what an agent would repair meanwhile."""
    checks = verify(rig.records()[pod.name], pod.netns)
    return {check.what: check.problem for check in checks if check.problem}


SABOTAGE = {
    "bpf": ["ip rule del pref 32764", "ip rule del pref 32765"],
    "iptables": ["iptables -t nat -F ISTIO_OUTPUT"],
}


@pytest.mark.parametrize("backend", SABOTAGE)
def test_a_lost_rule_is_named_and_the_leak_proven(
    rig: Rig, agent: Child, proxy: Child, backend: str
) -> None:
    """What is missing is named, the connection that escapes is noticed, the other pod is fine."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    for pod in (one, two):
        rig.enroll(pod, backend)
    agent.kill()
    for line in SABOTAGE[backend]:
        one.command(*line.split())
    found = failures_without_agent(rig, one)
    assert set(found) == {STEP, IPV4}
    assert "ip rule" in found[STEP] or "ISTIO_OUTPUT" in found[STEP]
    assert "left the pod unseen" in found[IPV4]
    assert failures_without_agent(rig, two) == {}


def test_a_dead_proxy_is_noticed(rig: Rig, proxy: Child, backend: str) -> None:
    """Without listeners a connection is refused, which is safe, but no capture."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, backend)
    proxy.kill()
    found = failures(rig, pod)
    assert set(found) == {IPV4, IPV6}
    assert all("refused" in problem for problem in found.values())


def test_only_the_families_of_the_pod_are_tried(rig: Rig, proxy: Child) -> None:
    """A pod without IPv6 is not blamed for it."""
    pod = rig.bed.pod("one", ipv6=False)
    rig.enroll(pod)
    checks = [check["what"] for check in rig.ask("verify", netns=pod.path)]
    assert IPV4 in checks
    assert IPV6 not in checks


def test_the_probe_leaves_no_cgroup(rig: Rig, proxy: Child, cgroup_tree: CgroupTree) -> None:
    """It runs in a cgroup of its own below the apps', for as long as it takes."""
    pod = rig.bed.pod("one")
    rig.enroll(pod)
    before = set(cgroup_tree.directories())
    assert failures(rig, pod) == {}
    assert set(cgroup_tree.directories()) == before


def test_what_is_excluded_is_not_tried(rig: Rig, proxy: Child, backend: str) -> None:
    """A pod that leaves out the address that is tried is not blamed for it."""
    pod = rig.bed.pod("one")
    rig.enroll(pod, backend)
    rig.ask("set", netns=pod.path, options={"outbound": {"include_cidrs": "2001:db8::/32"}})
    assert failures(rig, pod) == {}
    checks = [check["what"] for check in rig.ask("verify", netns=pod.path)]
    assert checks[2:] == ["192.0.2.1:9 is excluded, so IPv4 was not tried", IPV6]
