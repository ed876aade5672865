"""A pod that is enrolled once more: its backend and choices change, who it is does not."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest

from pyambient.errors import PyambientError, UsageError
from tests.bed import BedPod, bpf, changes, kernel_state

from .rig import DieAfter, FailAfter, Rig
from .test_enrolment import problems

_PAIRS = (
    *itertools.permutations(("bpf", "nftables", "iptables"), 2),
    *(("tc", "nftables"), ("iptables", "tc")),
    *(("bpf", "tc"), ("tc", "bpf")),
)


@pytest.fixture(params=_PAIRS, ids="-to-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The backend to begin with, and the next one."""
    before, after = request.param
    return before, after


def _switch(rig: Rig, pod: BedPod, backend: str) -> dict[str, Any]:
    return dict(rig.ask("enroll", netns=pod.path, backend=backend))


def _failure(rig: Rig, pod: BedPod, backend: str) -> str:
    try:
        _switch(rig, pod, backend)
    except PyambientError as error:
        return str(error)
    return ""


def test_a_switch_leaves_just_the_next_backend(rig: Rig, pair: tuple[str, str]) -> None:
    """There and back again: what is in the pod is what an enrolment would have made of it."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    rig.start_agent()
    rig.start_proxy()
    clean = kernel_state(one, two)
    # What pods share on the node is there for either backend from the beginning.
    other = rig.bed.pod("other")
    rig.enroll(other, pair[1])
    rig.enroll(two, pair[0])
    uid = rig.enroll(one, pair[0])["uid"]
    first = kernel_state(one, two)
    shown = _switch(rig, one, pair[1])
    assert (shown["uid"], shown["backend"], shown["state"]) == (uid, pair[1], "enrolled")
    rig.wait_until(lambda: rig.records()["one"].leaving == ())
    _switch(rig, one, pair[0])
    rig.wait_until(lambda: rig.records()["one"].leaving == ())
    assert changes(first, kernel_state(one, two)) == []
    _switch(rig, one, pair[1])
    assert [problems(rig, pod) for pod in (one, two)] == [[], []]
    for pod in (one, two, other):
        rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    assert changes(clean, kernel_state(one, two)) == []


@pytest.mark.parametrize("steps", [1, 4, 18])
def test_a_switch_that_fails_changes_nothing(rig: Rig, pair: tuple[str, str], steps: int) -> None:
    """After a failure the pod is captured as before; one with fewer steps does not fail."""
    pod, other = rig.bed.pod("one"), rig.bed.pod("other")
    agent = rig.start_agent()
    rig.start_proxy()
    # What pods share on the node is there for either backend from the beginning.
    rig.enroll(other, pair[1])
    rig.enroll(pod, pair[0])
    enrolled = kernel_state(pod)
    agent.kill()
    rig.start_agent(sabotage=FailAfter(steps))
    rig.wait_for_proxies()
    if failure := _failure(rig, pod, pair[1]):
        assert failure == "told to fail"
        assert rig.records()["one"].backend == pair[0]
        assert changes(enrolled, kernel_state(pod)) == []
    else:
        assert steps > 4
        assert rig.records()["one"].backend == pair[1]
    assert problems(rig, pod) == []


@pytest.mark.parametrize("steps", [1, 4, 18])
def test_an_agent_that_dies_in_a_switch(rig: Rig, pair: tuple[str, str], steps: int) -> None:
    """Its successor makes one of the two backends whole, and takes the other away."""
    pod = rig.bed.pod("one")
    agent = rig.start_agent()
    rig.start_proxy()
    before = kernel_state(pod)
    rig.enroll(pod, pair[0])
    agent.kill()
    agent = rig.start_agent(sabotage=DieAfter(steps))
    rig.wait_for_proxies()
    with contextlib.suppress(PyambientError, ConnectionError):
        _switch(rig, pod, pair[1])
    agent.kill()
    rig.start_agent()
    rig.wait_for_proxies()
    rig.wait_until(lambda: problems(rig, pod) == [])
    rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    assert changes(before, kernel_state(pod)) == []


def test_who_it_is_does_not_change(rig: Rig, backend: str) -> None:
    """Names may be given again or left out; others are refused as a usage error in one line."""
    pod = rig.bed.pod("one")
    rig.start_agent()
    rig.start_proxy()
    first = rig.enroll(pod, backend)
    assert rig.enroll(pod, backend) == first
    assert rig.ask("enroll", netns=pod.path) == first
    with pytest.raises(PyambientError, match="one is enrolled already, as default/one") as refused:
        rig.ask("enroll", netns=pod.path, service_account="another", backend="iptables")
    assert refused.value.exit_code == UsageError.exit_code
    assert "pyambient unenroll one" in refused.value.then
    assert rig.ask("status")["pods"][0]["backend"] == backend


def test_choices_and_backend_change_together(rig: Rig) -> None:
    """What is named changes, what is not stays as it was."""
    pod = rig.bed.pod("one")
    rig.start_agent()
    rig.start_proxy()
    rig.ask(
        "enroll",
        netns=pod.path,
        namespace="default",
        service_account="a",
        backend="bpf",
        options={"dns": False},
    )
    shown = rig.ask(
        "enroll", netns=pod.path, backend="nftables", options={"outbound": {"exclude_ports": "22"}}
    )
    assert (shown["backend"], shown["name"]) == ("nftables", "one")
    assert shown["options"]["dns"] is False
    assert shown["options"]["outbound"]["exclude_ports"] == "22"
    assert problems(rig, pod) == []


def test_a_first_enrolment_needs_an_identity(rig: Rig) -> None:
    """A namespace that is not enrolled yet has none to keep."""
    pod = rig.bed.pod("one")
    rig.start_agent()
    with pytest.raises(PyambientError, match="--namespace and --service-account") as refused:
        rig.ask("enroll", netns=pod.path, backend="bpf")
    assert refused.value.exit_code == UsageError.exit_code


def test_a_switch_needs_a_proxy(rig: Rig) -> None:
    """Without one the pod stays as it is: closed."""
    pod = rig.bed.pod("one")
    rig.start_agent()
    with rig.start_proxy():
        rig.enroll(pod, "bpf")
    enrolled = kernel_state(pod)
    with pytest.raises(PyambientError, match="no proxy is connected"):
        _switch(rig, pod, "nftables")
    assert changes(enrolled, kernel_state(pod)) == []


class _FailForGood:
    """Fails once after so many steps, and what was done cannot be undone then."""

    def __init__(self, steps: int) -> None:
        self._fail = FailAfter(steps)

    def __call__(self) -> None:
        try:
            self._fail()
        except PyambientError:
            bpf.make_read_only()
            raise


@pytest.mark.parametrize(("before", "steps"), [("nftables", 3), ("iptables", 20)])
def test_what_a_failed_switch_cannot_undo_is_not_forgotten(
    rig: Rig, before: str, steps: int
) -> None:
    """It is told why the switch failed; what it left is recorded, and goes when it can."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    agent = rig.start_agent()
    rig.start_proxy()
    for pod in (one, two):
        rig.enroll(pod, before)
    enrolled = kernel_state(one, two)
    agent.kill()
    rig.start_agent(sabotage=_FailForGood(steps))
    rig.wait_for_proxies()
    with bpf.writable_in_the_end():
        assert _failure(rig, one, "bpf") == "told to fail"
        record = rig.records()["one"]
        assert record.backend == before
        assert "bpf-node" in [step.kind for step in record.leaving]
        assert [problems(rig, pod) for pod in (one, two)] == [[], []]
        rig.wait_until(lambda: rig.logged("cannot take a former backend away"))
    rig.wait_until(lambda: rig.records()["one"].leaving == ())
    assert changes(enrolled, kernel_state(one, two)) == []


def test_a_former_backend_that_stays_is_taken_away_later(rig: Rig) -> None:
    """Nothing tried that again until the agent was started anew."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    rig.start_agent()
    clean = kernel_state(one, two)
    proxy = rig.start_proxy(slow_to_drain=True)
    for pod in (one, two):
        rig.enroll(pod, "bpf")
    _switch(rig, one, "nftables")
    with bpf.read_only():
        assert proxy.ask("drained")
        rig.wait_until(lambda: rig.logged("cannot take a former backend away"))
        assert rig.records()["one"].leaving
    rig.wait_until(lambda: rig.records()["one"].leaving == ())
    assert len(rig.logged("cannot take a former backend away")) == 1
    assert [problems(rig, pod) for pod in (one, two)] == [[], []]
    for pod in (one, two):
        rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    assert changes(clean, kernel_state(one, two)) == []


def test_connections_of_the_last_backend_are_waited_for_as_well(rig: Rig) -> None:
    """A switch while the one before settles: its leftovers went when the former's did."""
    pod = rig.bed.pod("one")
    rig.start_agent()
    proxy = rig.start_proxy(slow_to_drain=True)
    rig.enroll(pod, "bpf")
    _switch(rig, pod, "nftables")
    rig.wait_until(lambda: "settle one 30" in proxy.ask("calls"))
    _switch(rig, pod, "iptables")
    assert proxy.ask("drained")
    rig.wait_until(lambda: rig.records()["one"].leaving == ())
    assert proxy.ask("calls").count("settle one 30") == 2
    assert problems(rig, pod) == []
