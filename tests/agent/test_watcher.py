"""A living pod changes: its enrolment follows, and nobody else's does."""

from __future__ import annotations

import pytest
import trio

from pyambient.agent.enrolled import Enrolled
from pyambient.agent.records import NetnsRef, Record, State
from pyambient.agent.watcher import watch_network
from pyambient.errors import PyambientError
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from tests.bed import Network, changes, kernel_state

from .rig import Rig


def test_an_address_that_comes_and_goes(rig: Rig, backend: str) -> None:
    """Steps, record, status and the proxy's details follow; the other pod's stay as they are."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    rig.start_agent()
    proxy = rig.start_proxy()
    for pod in (one, two):
        rig.enroll(pod, backend)
    before, others = rig.records()["one"], rig.records()["two"]
    one.command("ip", "addr", "add", "10.77.0.99/24", "dev", "eth0")
    rig.wait_until(lambda: "10.77.0.99" in rig.records()["one"].addresses)
    described = f"describe one {backend} {one.ipv4} 10.77.0.99 {one.ipv6}"
    rig.wait_until(lambda: described in proxy.ask("calls"))
    assert rig.ask("status")["pods"][0]["addresses"] == [one.ipv4, "10.77.0.99", one.ipv6]
    assert all(check["problem"] == "" for check in rig.ask("verify", netns=one.path))
    one.command("ip", "addr", "del", "10.77.0.99/24", "dev", "eth0")
    rig.wait_until(lambda: rig.records()["one"] == before)
    assert rig.records()["two"] == others


def test_a_device_that_comes_later(rig: Rig) -> None:
    """A second device is captured as the first one is, and leaves nothing when it is freed."""
    pod, other = rig.bed.pod("one"), rig.bed.pod("two")
    network = rig.bed.add_network(Network("br66", "10.66.0", "fd66::"))
    before = kernel_state(other)
    rig.start_agent()
    rig.start_proxy()
    for enrolled in (pod, other):
        rig.enroll(enrolled)
    address, _ = rig.bed.add_device(pod, "eth1", network)
    rig.wait_until(lambda: address in rig.records()["one"].addresses)
    assert "dev eth1" in pod.command("ip", "route", "show", "table", "100")
    for enrolled in (pod, other):
        rig.ask("unenroll", netns=enrolled.path, drain_timeout=0)
    assert changes(before, kernel_state(other)) == []
    assert "table 100" not in pod.command("ip", "route", "show", "table", "all")


def test_a_replaced_namespace_is_another_pod(rig: Rig) -> None:
    """Deleted and made again under the same name, it is not enrolled, and can be."""
    one = rig.bed.pod("one")
    rig.start_agent()
    rig.start_proxy()
    first = rig.enroll(one)
    rig.bed.remove_pod(one)
    again = rig.bed.pod("one")
    second = rig.enroll(again)
    assert second["uid"] != first["uid"]
    rig.wait_until(lambda: [r.pod.uid for r in rig.store.all()] == [second["uid"]])
    assert all(check["problem"] == "" for check in rig.ask("verify", netns=again.path))


def test_a_pod_without_addresses_gets_its_own_later(rig: Rig) -> None:
    """It can be enrolled before it has a device, and is captured once it has one."""
    pod = rig.bed.pod("one", ipv4=False, ipv6=False)
    rig.start_agent()
    rig.start_proxy()
    assert rig.enroll(pod)["addresses"] == []
    checks = rig.ask("verify", netns=pod.path)
    assert "it has none, so nothing can be tried" in [check["problem"] for check in checks]
    pod.command("ip", "addr", "add", "10.77.0.50/24", "dev", "eth0")
    pod.command("ip", "route", "add", "default", "via", "10.77.0.1")
    rig.wait_until(lambda: rig.records()["one"].addresses == ("10.77.0.50",))
    assert all(check["problem"] == "" for check in rig.ask("verify", netns=pod.path))


def test_a_freed_pod_is_not_followed_any_more(rig: Rig) -> None:
    """A change after the un-enrolment adds nothing."""
    pod = rig.bed.pod("one")
    rig.start_agent()
    rig.start_proxy()
    rig.enroll(pod)
    rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    pod.command("ip", "addr", "add", "10.77.0.99/24", "dev", "eth0")
    other = rig.bed.pod("two")
    rig.enroll(other)
    assert list(rig.records()) == ["two"]
    assert "lookup 100" not in pod.command("ip", "rule")
    with pytest.raises(PyambientError, match="one is not enrolled"):
        rig.ask("verify", netns=pod.path)


@pytest.mark.parametrize("failure", [PyambientError("no"), OSError(2, "gone"), KeyError("a bug")])
def test_a_change_that_cannot_be_followed_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """Whatever it fails with, the watch goes on."""
    monkeypatch.setattr("pyambient.agent.watcher._FIRST_RETRY", 0.01)
    outcomes: list[Exception | None] = [failure, failure, None]

    async def main() -> None:
        followed = trio.Event()

        async def changed() -> None:
            if (outcome := outcomes.pop(0)) is not None:
                raise outcome
            followed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch_network, enrolled, changed, changed)
            with trio.fail_after(20):
                await followed.wait()
            nursery.cancel_scope.cancel()

    with Netns.empty() as netns:
        pod = PodRef("u1", "one", "default", "one")
        ref = NetnsRef.of(netns, "/run/netns/one")
        enrolled = Enrolled(Record(pod, ref, "bpf", State.ENROLLED, ()), netns)
        trio.run(main)
    assert outcomes == []
