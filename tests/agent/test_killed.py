"""kill -9 of agent, proxy, or both after each single step: closed meanwhile, whole again after.

How many steps there are nobody says here: a test goes on until nothing was left to be killed in.
Each kills after every third step, beginning with another one. One of the two pods stays enrolled
all the time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from pyambient.errors import PyambientError
from tests.bed import BedPod, Child, changes, kernel_state
from tests.bed.patience import patience

from .outage import EVERYTHING, try_all
from .rig import Fuse, Rig
from .test_enrolment import problems

_SHORT = 0.2
_LONG = patience(5)
_FEWEST = 8
_STRIDE = 3
_NEXT = {"bpf": "nftables", "nftables": "tc", "tc": "iptables", "iptables": "bpf"}
_VICTIMS = {"agent": (True, False), "proxy": (False, True), "both": (True, True)}


pytestmark = pytest.mark.timeout(patience(300))


@pytest.fixture(params=range(1, _STRIDE + 1), ids="from-{}".format)
def first(request: pytest.FixtureRequest) -> int:
    """After which step to kill at first."""
    return int(request.param)


class Scene:
    """Two pods in a mesh that is killed and started again, and one outside of it."""

    def __init__(self, rig: Rig, backend: str, victims: str) -> None:
        kills_agent, kills_proxy = _VICTIMS[victims]
        self._rig = rig
        self._backend = backend
        self._fuse = Fuse(agent=kills_agent, proxies=rig.bed.cgroup.proxy if kills_proxy else None)
        self._burnt = True
        self._processes: dict[str, Child] = {}
        rig.settings = dataclasses.replace(rig.settings, proxy_timeout=1)
        self.one, self.two, self._outside = (rig.bed.pod(n) for n in ("one", "two", "outside"))
        for pod in (self.one, self.two):
            assert try_all(pod, self._outside, _LONG).leaked == EVERYTHING
        self.restart()
        rig.enroll(self.two, backend)
        self._clean = kernel_state(self.one, self.two)

    def restart(self) -> None:
        """Start what does not run, and wait until the two know each other."""
        starts = {
            "agent": lambda: self._rig.start_agent(self._fuse, undoing=True),
            "proxy": self._rig.start_proxy,
        }
        for name, start in starts.items():
            if name not in self._processes or not self.lives(name):
                self._processes[name] = start()
        self._rig.wait_for_proxies()

    def lives(self, name: str) -> bool:
        return self._processes[name].alive

    def steps(self, first: int) -> Iterator[int]:
        """So many, then some more, and so on, until nobody was killed."""
        for steps in itertools.count(first, _STRIDE):
            if not self._burnt:
                return
            yield steps

    def cut_short(self, steps: int, command: str, **arguments: Any) -> bool:
        """Kill so many steps after the agent was asked; whether it did it and lived to say so."""
        self._fuse.light(steps)
        done = self.ask(command, **arguments)
        if done:
            self._rig.wait_until(self._has_tidied)
        self._burnt = not self._fuse.left
        self._fuse.light(0)
        return done

    def _has_tidied(self) -> bool:
        return not self.lives("agent") or not any(r.leaving for r in self._rig.store.all())

    def ask(self, command: str, **arguments: Any) -> bool:
        """Whether the agent did for the pod `one` what it was asked."""
        names = {"name": "one", "namespace": "default", "service_account": "one"}
        more = names if command == "enroll" else {"drain_timeout": 0}
        try:
            self._rig.ask(command, netns=self.one.path, **more, **arguments)
        except (PyambientError, ConnectionError):
            return False
        return True

    def leaked(self) -> frozenset[str]:
        """What of the pod `one` is to be seen on the wire now."""
        return try_all(self.one, self._outside, _SHORT).leaked

    def assert_goes_on(self, *pods: BedPod) -> None:
        """What a proxy that lives serves is served; without one nothing is, and nothing leaks."""
        lives = self.lives("proxy")
        for pod in pods:
            tried = try_all(pod, self._outside, _LONG if lives else _SHORT)
            assert tried.leaked == frozenset()
            assert set(tried.failed) == (set() if lives else EVERYTHING), tried.failed

    def assert_works(self) -> None:
        """The pod `one` in all that can be verified, and the other as far as an app sees it."""
        self._rig.wait_until(lambda: problems(self._rig, self.one) == [])
        self.assert_goes_on(self.one, self.two)

    def assert_nothing_left(self) -> None:
        assert changes(self._clean, kernel_state(self.one, self.two)) == []


@pytest.mark.parametrize("victims", ["proxy", "both"])
def test_in_an_enrolment(rig: Rig, backend: str, victims: str, first: int) -> None:
    """What was captured by one step stays so with the next; what is enrolled is closed."""
    scene = Scene(rig, backend, victims)
    leaked = EVERYTHING
    for steps in scene.steps(first):
        enrolled = scene.cut_short(steps, "enroll", backend=backend)
        scene.assert_goes_on(scene.two)
        if enrolled:
            scene.assert_goes_on(scene.one)
        elif not scene.lives("agent"):
            before, leaked = leaked, scene.leaked()
            assert leaked <= before, f"after step {steps}"
            assert not leaked or steps < len(rig.records()["one"].steps)
        scene.restart()
        if not enrolled:
            scene.assert_nothing_left()
            assert scene.ask("enroll", backend=backend)
        scene.assert_works()
        assert scene.ask("unenroll")
        if enrolled:
            scene.assert_nothing_left()
    assert steps > _FEWEST


def test_in_an_unenrolment(rig: Rig, backend: str, first: int) -> None:
    """The next agent goes on where the one that was killed has stopped."""
    scene = Scene(rig, backend, "agent")
    for steps in scene.steps(first):
        assert scene.ask("enroll", backend=backend)
        scene.cut_short(steps, "unenroll")
        scene.assert_goes_on(scene.two)
        scene.restart()
        rig.wait_until(lambda: list(rig.records()) == ["two"])
        scene.assert_nothing_left()
        scene.assert_goes_on(scene.two)
    assert steps > _FEWEST


def test_in_a_switch(rig: Rig, backend: str, first: int) -> None:
    """One backend or the other captures at any moment, and the next agent makes one whole."""
    scene = Scene(rig, backend, "agent")
    for steps in scene.steps(first):
        assert scene.ask("enroll", backend=backend)
        scene.cut_short(steps, "enroll", backend=_NEXT[backend])
        assert scene.leaked() == frozenset(), f"after step {steps}"
        scene.assert_goes_on(scene.two)
        scene.restart()
        scene.assert_works()
        assert scene.ask("unenroll")
        scene.assert_nothing_left()
    assert steps > _FEWEST
