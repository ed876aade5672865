"""Namespaces that are replaced under their name: the replacement is enrolled as they were."""

from __future__ import annotations

from pyambient.agent.locate import is_replaced
from pyambient.agent.records import NetnsRef, State
from pyambient.netns import Netns
from tests.bed import BedPod, Channel, changes, kernel_state

from .rig import DieAfter, Rig

_CHOICES = {"outbound": {"exclude_cidrs": "10.9.0.0/16"}}


def _replace(rig: Rig, pod: BedPod) -> BedPod:
    rig.bed.remove_pod(pod)
    return rig.bed.pod(pod.name)


def _uids(rig: Rig) -> dict[str, list[str]]:
    """The enrolled pods' uids by name."""
    found: dict[str, list[str]] = {}
    for record in rig.store.all():
        if record.state is State.ENROLLED:
            found.setdefault(record.pod.name, []).append(record.pod.uid)
    return found


def _is_another(rig: Rig, uid: str) -> bool:
    """Whether the pod `one` has one record, enrolled, and its uid is not this one."""
    found = [(r.pod.uid != uid, r.state) for r in rig.store.all() if r.pod.name == "one"]
    return found == [(True, State.ENROLLED)]


def _works(rig: Rig, pod: BedPod) -> bool:
    return not any(check["problem"] for check in rig.ask("verify", netns=pod.path))


def test_a_replacement_is_enrolled(rig: Rig, backend: str) -> None:
    """With the same names, backend and choices; logged, counted, and nothing of either is left."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    before = kernel_state(two)
    rig.start_agent()
    rig.start_proxy()
    for pod in (one, two):
        rig.enroll(pod, backend)
    changed = rig.ask("set", netns=one.path, options=_CHOICES)
    others = _uids(rig)["two"]
    again = _replace(rig, one)
    rig.wait_until(lambda: _is_another(rig, changed["uid"]))
    status = {pod["name"]: pod for pod in rig.ask("status")["pods"]}
    kept = ("name", "namespace", "service_account", "backend", "options", "path")
    assert [status["one"][key] for key in kept] == [changed[key] for key in kept]
    assert (status["one"]["repairs"].get("netns"), status["two"]["repairs"]) == (1, {})
    assert _works(rig, again)
    assert _works(rig, two)
    assert _uids(rig)["two"] == others
    assert [line["netns"] for line in rig.logged("enrolled a replacement")] == ["one"]
    for pod in (again, two):
        rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    assert changes(before, kernel_state(two)) == []
    assert _uids(rig) == {}


def test_a_replacement_while_no_agent_runs(rig: Rig, backend: str) -> None:
    """The next agent sees it; killed on the way, the one after that."""
    one, two = rig.bed.pod("one"), rig.bed.pod("two")
    before = kernel_state(two)
    agent = rig.start_agent()
    proxy = rig.start_proxy()
    former = rig.enroll(one, backend)
    rig.enroll(two, backend)
    agent.kill()
    proxy.kill()
    again = _replace(rig, one)
    dying = rig.start_agent(sabotage=DieAfter(1))
    rig.start_proxy()
    rig.wait_until(lambda: not dying.alive)
    assert former["uid"] in [record.pod.uid for record in rig.store.all()]
    rig.start_agent()
    rig.start_proxy()
    rig.wait_until(lambda: _is_another(rig, former["uid"]))
    assert _works(rig, again)
    for pod in (again, two):
        rig.ask("unenroll", netns=pod.path, drain_timeout=0)
    assert changes(before, kernel_state(two)) == []


def test_who_lives_on_in_the_former_one_stays_enrolled(rig: Rig) -> None:
    """A process in it is still a pod's; with its end the former enrolment ends, too."""
    one = rig.bed.pod("one")
    rig.start_agent()
    rig.start_proxy()
    former = rig.enroll(one)
    survivor = rig.bed.node.spawn(_live_in, one, uid=0, gid=0)
    assert survivor.receive() == "here"
    again = _replace(rig, one)
    rig.wait_until(lambda: len(_uids(rig)["one"]) == 2)
    assert former["uid"] in _uids(rig)["one"]
    assert _works(rig, again)
    survivor.kill()
    rig.wait_until(lambda: _is_another(rig, former["uid"]))
    assert _works(rig, again)


def _live_in(channel: Channel, pod: BedPod) -> None:
    with pod.netns.entered():
        channel.send("here")
        channel.receive()


def test_a_replacement_that_cannot_be_enrolled_yet(rig: Rig) -> None:
    """It is tried again, and said once why not; the former pod is not forgotten meanwhile."""
    one = rig.bed.pod("one")
    rig.start_agent()
    proxy = rig.start_proxy()
    former = rig.enroll(one)
    proxy.kill()
    again = _replace(rig, one)
    rig.wait_until(lambda: rig.logged("cannot enrol a replacement"))
    assert former["uid"] in _uids(rig)["one"]
    rig.start_proxy()
    rig.wait_until(lambda: _is_another(rig, former["uid"]))
    reasons = [line["error"] for line in rig.logged("cannot enrol a replacement")]
    assert len(reasons) == len(set(reasons))
    assert _works(rig, again)


def test_a_pid_is_no_name() -> None:
    """Another process may have the number by now; nobody meant that one's namespace."""
    with Netns.own() as own, Netns.empty() as other:
        for path, replaced in (("/proc/self/ns/net", False), ("/nonexistent", False)):
            assert is_replaced(NetnsRef.of(other, path)) is replaced
        assert not is_replaced(NetnsRef.of(own, "/proc/self/ns/net"))
