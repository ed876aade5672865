"""Enrolling and freeing two pods through a real agent, with real listeners, in real namespaces."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pyambient.agent import enrolment
from pyambient.agent.records import Record, RecordStore, State
from pyambient.errors import PyambientError, UsageError
from tests.bed import BedPod, changes, kernel_state

from .rig import FailOnceMoreEachTime, Rig


@pytest.fixture
def pods(rig: Rig) -> tuple[BedPod, BedPod]:
    return rig.bed.pod("one"), rig.bed.pod("two")


def test_two_pods_come_and_go_and_leave_nothing(
    rig: Rig, pods: tuple[BedPod, BedPod], backend: str
) -> None:
    """Both are enrolled and captured, each is freed by itself, and nothing is left behind."""
    one, two = pods
    rig.start_agent()
    rig.start_proxy()
    before = kernel_state(one, two)
    for pod in pods:
        shown = rig.enroll(pod, backend)
        assert shown["addresses"] == [pod.ipv4, pod.ipv6]
        assert (shown["backend"], shown["state"]) == (backend, "enrolled")
    assert [record.state for record in rig.records().values()] == [State.ENROLLED] * 2
    for pod in pods:
        assert problems(rig, pod) == []
    rig.ask("unenroll", netns=one.path, drain_timeout=0)
    assert problems(rig, two) == []
    rig.ask("unenroll", netns=two.path, drain_timeout=0)
    assert changes(before, kernel_state(one, two)) == []
    assert list(rig.run_dir.pods.iterdir()) == []


def problems(rig: Rig, pod: BedPod) -> list[str]:
    """What `verify` finds wrong."""
    checks = rig.ask("verify", netns=pod.path)
    assert {"an IPv4 connection of an app reaches the proxy"} <= {check["what"] for check in checks}
    return [check["problem"] for check in checks if check["problem"]]


def test_the_proxy_is_told_in_order(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """Details come before the Add, the drain before the Del, and only then the pod is gone."""
    one, _ = pods
    rig.start_agent()
    proxy = rig.start_proxy()
    rig.wait_for_proxies()
    rig.enroll(one, "iptables")
    rig.ask("unenroll", netns=one.path, drain_timeout=2)
    addresses = f"{one.ipv4} {one.ipv6}"
    assert proxy.ask("calls") == [
        "retain",
        f"describe one iptables {addresses}",
        "add one",
        "drain one 2",
        "remove one",
    ]


def test_a_refusal_of_the_proxy_undoes_everything(
    rig: Rig, pods: tuple[BedPod, BedPod], backend: str
) -> None:
    """A nack is one line to the user, the other pod goes on, and a second try is possible."""
    one, two = pods
    rig.start_agent()
    proxy = rig.start_proxy(refusing=["two"])
    rig.enroll(one, backend)
    before = kernel_state(one, two)
    for _ in range(2):
        with pytest.raises(PyambientError, match=r"cannot serve default/two.*two is not wanted"):
            rig.enroll(two, backend)
    assert changes(before, kernel_state(one, two)) == []
    assert list(rig.records()) == ["one"]
    assert proxy.ask("calls").count("add two") == 2
    assert problems(rig, one) == []


def test_without_a_proxy_nothing_is_captured(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """No proxy in time fails the enrolment, closed: what was prepared is undone."""
    rig.settings = dataclasses.replace(rig.settings, proxy_timeout=0.1)
    rig.start_agent()
    before = kernel_state(*pods)
    with pytest.raises(PyambientError, match=r"no proxy is connected.*pyambient up"):
        rig.enroll(pods[0])
    assert changes(before, kernel_state(*pods)) == []
    assert rig.records() == {}


def test_a_proxy_outside_its_cgroup_is_refused(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """The BPF programs would take its sockets for an app's, so it must not get pods that way."""
    rig.start_agent()
    proxy = rig.start_proxy(in_cgroup=False)
    before = kernel_state(*pods)
    with pytest.raises(PyambientError, match=rf"pid {proxy.pid}\) is not in its cgroup"):
        rig.enroll(pods[0], "bpf")
    assert changes(before, kernel_state(*pods)) == []
    assert rig.enroll(pods[0], "iptables")["state"] == "enrolled"


def test_a_namespace_is_enrolled_once(rig: Rig, pods: tuple[BedPod, BedPod]) -> None:
    """A second enrolment, even by another path, is a usage error that names the pod."""
    rig.start_agent()
    rig.start_proxy()
    rig.enroll(pods[0])
    other_name = Path("/run/netns/other")
    other_name.symlink_to(pods[0].path)
    names = {"name": "x", "namespace": "default", "service_account": "x"}
    with pytest.raises(PyambientError, match="one is enrolled already, as default/one") as failure:
        rig.ask("enroll", netns=str(other_name), **names)
    assert failure.value.exit_code == UsageError.exit_code
    rig.ask("unenroll", netns=str(other_name), drain_timeout=0)
    assert rig.records() == {}


def test_enrolments_at_the_same_time(rig: Rig, pods: tuple[BedPod, BedPod], backend: str) -> None:
    """Two pods do not get into each other's way; enrolments of one pod come one after another."""
    rig.start_agent()
    rig.start_proxy()
    before = kernel_state(*pods)
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(partial(_failure, rig, backend=backend), pods * 3))
    assert answers == [None] * 6
    assert len(rig.records()) == 2
    for pod in pods:
        assert problems(rig, pod) == []
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pod: rig.ask("unenroll", netns=pod.path, drain_timeout=0), pods))
    assert changes(before, kernel_state(*pods)) == []


def test_a_failure_after_any_step_undoes_all(
    rig: Rig, pods: tuple[BedPod, BedPod], backend: str
) -> None:
    """Whichever step an enrolment fails after, before or behind the listeners, nothing is left."""
    _, two = pods
    rig.start_agent(sabotage=FailOnceMoreEachTime())
    rig.start_proxy()
    before = kernel_state(two)
    failures = 0
    while (failure := _failure(rig, two, backend)) is not None:
        failures += 1
        assert failure == "told to fail"
        assert changes(before, kernel_state(two)) == [], f"after step {failures}"
        assert rig.records() == {}
    assert failures == len(rig.records()["two"].steps)


def _fill_disk() -> None:
    """The next three records cannot be written."""
    write = RecordStore.write
    left = iter(range(3))

    def fail(store: RecordStore, record: Record) -> None:
        if next(left, None) is None:
            RecordStore.write = write
            return store.write(record)
        raise OSError(errno.ENOSPC, "No space left on device")

    RecordStore.write = fail


def _run_out_of_time() -> None:
    enrolment._ROLLBACK_TIMEOUT = 0.0


@pytest.mark.parametrize("trouble", [_fill_disk, _run_out_of_time])
def test_a_roll_back_that_cannot_begin_is_tried_again(
    rig: Rig, pods: tuple[BedPod, BedPod], backend: str, trouble: Callable[[], None]
) -> None:
    """Nobody else knows of the pod then; the other one comes and goes meanwhile."""
    one, two = pods

    def fail() -> None:
        if rig.records().keys() == {"two"}:
            trouble()
            raise PyambientError("told to fail")

    rig.start_agent(sabotage=fail)
    rig.start_proxy()
    before = kernel_state(one, two)
    assert _failure(rig, two, backend) == "told to fail"
    rig.wait_until(lambda: rig.records() == {})
    assert changes(before, kernel_state(one, two)) == []
    assert rig.logged("could not undo everything")
    rig.enroll(one, backend)
    assert problems(rig, one) == []


def _failure(rig: Rig, pod: BedPod, backend: str) -> str | None:
    try:
        rig.enroll(pod, backend)
    except PyambientError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "a b"), ("namespace", ""), ("service_account", "x" * 254), ("backend", "magic")],
)
def test_names_that_no_identity_can_have(rig: Rig, field: str, value: str) -> None:
    """They are refused as usage errors before anything is opened or written."""
    rig.start_agent()
    fields = {"name": "a", "namespace": "default", "service_account": "a", field: value}
    with pytest.raises(PyambientError) as failure:
        rig.ask("enroll", netns=rig.bed.pod("one").path, **fields)
    assert failure.value.exit_code == UsageError.exit_code
    assert rig.records() == {}
