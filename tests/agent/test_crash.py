"""What is left when an agent is killed at the worst moment, and who puts it right."""

from __future__ import annotations

import itertools

import pytest

from pyambient.agent.interception import free
from pyambient.agent.records import State
from pyambient.errors import PyambientError
from pyambient.intercept.interface import to_record
from tests.bed import BedPod, bpf, changes, kernel_state

from .rig import DieAfter, FailAfter, Rig


def test_any_process_can_undo_a_crash_after_any_step(rig: Rig, backend: str) -> None:
    """An enrolment cut short after any of its steps leaves a record that undoes all of them."""
    pod = rig.bed.pod("one")
    before = kernel_state(pod)
    for steps in itertools.count(1):
        rig.start_agent(sabotage=DieAfter(steps))
        with rig.start_proxy():
            if not _dies(rig, pod, backend):
                break
        record = rig.records()["one"]
        assert record.state is State.ENROLLING
        free(record, rig.store)
        assert rig.records() == {}
        assert changes(before, kernel_state(pod)) == [], f"after step {steps}"
    assert steps > len(rig.records()["one"].steps)


def _dies(rig: Rig, pod: BedPod, backend: str) -> bool:
    try:
        rig.enroll(pod, backend)
    except (PyambientError, ConnectionError):
        return True
    return False


def test_the_next_agent_undoes_what_was_half_done(rig: Rig, backend: str) -> None:
    """A new agent finishes neither enrolment nor un-enrolment of its predecessor's: it undoes."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    rig.start_proxy()
    before = kernel_state(one, two)
    rig.start_agent(sabotage=DieAfter(7))
    assert _dies(rig, one, backend)
    rig.start_agent()
    rig.wait_for_proxies()
    assert rig.records() == {}
    rig.wait_until(lambda: changes(before, kernel_state(one, two)) == [])


def test_enrolled_pods_survive_their_agent(rig: Rig, backend: str) -> None:
    """Killed and started again, an agent goes on with its pods, and captures never ceased."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    agent = rig.start_agent()
    proxy = rig.start_proxy()
    before = kernel_state(one, two)
    for pod in (one, two):
        rig.enroll(pod, backend)
    enrolled = kernel_state(one, two)
    agent.kill()
    assert changes(enrolled, kernel_state(one, two)) == []
    rig.start_agent()
    rig.wait_for_proxies()
    assert changes(enrolled, kernel_state(one, two)) == []
    assert {pod["state"] for pod in rig.ask("status")["pods"]} == {"enrolled"}
    assert not any(call.startswith("remove") for call in proxy.ask("calls"))
    for pod in (one, two):
        rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    assert changes(before, kernel_state(one, two)) == []


def test_an_agent_repairs_what_was_lost_meanwhile(rig: Rig) -> None:
    """A rule that somebody removed while no agent ran is back when one does."""
    pod = rig.bed.pod("one")
    agent = rig.start_agent()
    rig.start_proxy()
    rig.enroll(pod)
    enrolled = kernel_state(pod)
    agent.kill()
    pod.command("ip", "rule", "del", "pref", "32764")
    assert changes(enrolled, kernel_state(pod)) != []
    rig.start_agent()
    rig.wait_until(lambda: changes(enrolled, kernel_state(pod)) == [])


@pytest.mark.parametrize("agent_runs", [True, False])
def test_a_pod_that_is_gone_leaves_nothing(rig: Rig, backend: str, *, agent_runs: bool) -> None:
    """Its namespace deleted, with an agent there or away, a pod is dropped from kernel and disk."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    before = kernel_state(two)
    agent = rig.start_agent()
    proxy = rig.start_proxy()
    for pod in (one, two):
        rig.enroll(pod, backend)
    if not agent_runs:
        agent.kill()
        proxy.kill()
    rig.bed.remove_pod(one)
    if not agent_runs:
        rig.start_agent()
        rig.start_proxy()
    rig.wait_until(lambda: list(rig.records()) == ["two"])
    rig.wait_for_proxies()
    rig.ask("unenroll", netns=two.path, drain_timeout=0)
    assert changes(before, kernel_state(two)) == []


def test_a_second_agent_is_refused(rig: Rig) -> None:
    """Two agents in one run directory would undo each other's work."""
    rig.start_agent()
    with pytest.raises(PyambientError, match="another pyambient agent"):
        rig.start_agent()


def test_the_next_agent_goes_on_with_a_drain(rig: Rig) -> None:
    """An agent killed while a pod drained cuts nothing: its successor waits for the proxy, too."""
    pod = rig.bed.pod("one")
    before = kernel_state(pod)
    agent = rig.start_agent()
    proxy = rig.start_proxy(slow_to_drain=True)
    rig.enroll(pod)
    asking = rig.bed.node.spawn(_unenroll, rig, pod.path, uid=0, gid=0)
    rig.wait_until(lambda: "drain one 30" in proxy.ask("calls"))
    agent.kill()
    assert rig.records()["one"].state is State.DRAINING
    asking.kill()
    proxy.ask("forget")
    rig.start_agent()
    rig.wait_until(lambda: "drain one 30" in proxy.ask("calls"))
    assert rig.ask("status")["pods"][0]["state"] == "draining"
    assert "lookup 100" in pod.command("ip", "rule")
    assert proxy.ask("drained")
    rig.wait_until(lambda: rig.records() == {})
    assert changes(before, kernel_state(pod)) == []


def _unenroll(_: object, rig: Rig, path: str) -> None:
    rig.ask("unenroll", netns=path)


def test_a_change_of_choices_is_completed_by_the_next_agent(rig: Rig, backend: str) -> None:
    """Killed between noting what was chosen and doing it, an agent leaves the rest to the next."""
    pod, other = rig.bed.pod("one"), rig.bed.pod("two")
    agent = rig.start_agent()
    rig.start_proxy()
    before = kernel_state(pod, other)
    for one in (pod, other):
        rig.enroll(one, backend)
    agent.kill()
    record = rig.records()["one"]
    chosen = {"outbound": {"exclude_cidrs": "10.96.0.0/12,fd96::/16"}}
    rig.store.write(record.changed(options=record.options.changed(chosen)))
    rig.start_agent()
    rig.wait_for_proxies()
    rig.wait_until(lambda: "10.96.0.0" in str(to_record(rig.records()["one"].steps)))
    rig.wait_until(lambda: not any(c["problem"] for c in rig.ask("verify", netns=pod.path)))
    assert rig.records()["two"].steps != rig.records()["one"].steps
    for one in (pod, other):
        rig.ask("unenroll", netns=one.path, drain_timeout=0)
    assert changes(before, kernel_state(pod, other)) == []


def test_what_could_not_be_undone_is_tried_again(rig: Rig) -> None:
    """A failed enrolment, a half-done one, a pod that is gone: nobody has to start an agent."""
    one, two, gone = (rig.bed.pod(name) for name in ("one", "two", "gone"))
    clean = kernel_state(one, two)
    agent = rig.start_agent()
    rig.start_proxy()
    rig.enroll(gone)
    agent.kill()
    dying = rig.start_agent(sabotage=DieAfter(9))
    rig.wait_for_proxies()
    assert _dies(rig, one, "bpf")
    rig.wait_until(lambda: not dying.alive)
    rig.bed.remove_pod(gone)
    with bpf.read_only():
        rig.start_agent(sabotage=FailAfter(1))
        rig.wait_for_proxies()
        assert set(rig.records()) == {"one", "gone"}
        assert _dies(rig, two, "bpf")
        rig.wait_until(lambda: len(rig.logged("cannot free a pod")) == 3)
    rig.wait_until(lambda: rig.records() == {})
    assert changes(clean, kernel_state(one, two)) == []
