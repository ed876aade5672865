"""An agent and a proxy in processes of their own, for tests that ask, kill and look.

The agent is the real one. The proxy is a small one: real ZDS and details clients, real listeners
in the pods, and nobody behind them.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import trio

from pyambient.agent import enrolment, interception, switch
from pyambient.agent.agent import Agent
from pyambient.agent.client import ask
from pyambient.agent.config import AgentSettings, RunDir
from pyambient.agent.lock import AgentLock
from pyambient.agent.records import Record, RecordStore
from pyambient.errors import PyambientError
from pyambient.intercept.interface import Pod, Stage, Step
from pyambient.intercept.runner import ALL_STAGES
from pyambient.model.backends import NETFILTER
from pyambient.model.ports import WELL_KNOWN
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.logs import configure
from pyambient.proxy import sockets
from pyambient.proxy.details_client import serve_details
from pyambient.proxy.zds_client import serve_zds
from pyambient.zds.details import Explain, PodDetails
from tests.bed import Bed, BedPod, Channel, Child
from tests.bed.patience import patience

from .small_dns import SmallForwarder

_PATIENCE = patience(20)


class Rig:
    """One run directory, and who works in it."""

    def __init__(self, bed: Bed, directory: Path) -> None:
        self.bed = bed
        self.run_dir = RunDir(directory / "run")
        self.store = RecordStore(self.run_dir.pods)
        self.settings = AgentSettings(
            self.run_dir, bed.cgroup.path, proxy_timeout=5, round_pause=0.5
        )
        self.run_dir.prepare()

    def start_agent(
        self, sabotage: Callable[[], None] | None = None, *, undoing: bool = False
    ) -> Child:
        """An agent that answers; `sabotage` is called in it right after each applied step.

        And after each one that is undone, if it is about `undoing`, too.
        """
        arguments = (self.settings, sabotage, undoing)
        agent = self.bed.node.spawn(_run_agent, *arguments, uid=0, gid=0)
        assert agent.receive() == "ready"
        return agent

    def start_proxy(
        self,
        refusing: Iterable[str] = (),
        *,
        in_cgroup: bool = True,
        slow_to_drain: bool = False,
        foreign: bool = False,
    ) -> Child:
        """A proxy that is about to connect, and refuses the pods of these names.

        One that is foreign speaks ZDS alone. One that is slow to drain, or to settle, waits until
        it is told "drained". "calls" asks for what it was told so far, "forget" empties that.
        """
        cgroup = self.bed.cgroup.proxy if in_cgroup else None
        self.bed.cgroup.proxy.mkdir(exist_ok=True)
        arguments = (self.run_dir, frozenset(refusing))
        how = {"slow_to_drain": slow_to_drain, "foreign": foreign}
        return self.bed.node.spawn(_run_proxy, *arguments, **how, uid=0, gid=0, cgroup=cgroup)

    def ask(self, command: str, **arguments: Any) -> Any:
        return ask(self.run_dir, command, _PATIENCE, **arguments)

    def enroll(self, pod: BedPod, backend: str = "bpf") -> dict[str, Any]:
        names = {"name": pod.name, "namespace": "default", "service_account": pod.name}
        return dict(self.ask("enroll", netns=pod.path, backend=backend, **names))

    def logged(self, message: str) -> list[dict[str, Any]]:
        """The agent's log lines with this message so far."""
        lines = (self.run_dir.path / "log").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["message"] == message]

    def records(self) -> dict[str, Record]:
        """What is on disk, by the pods' names."""
        return {record.pod.name: record for record in self.store.all()}

    def wait_until(self, condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(condition)
            time.sleep(0.02)

    def wait_for_proxies(self, count: int = 1) -> None:
        self.wait_until(lambda: len(self.ask("status")["proxies"]) == count)


class FailOnceMoreEachTime:
    """Fails the first enrolment after its first step, the second after its second, and so on."""

    def __init__(self) -> None:
        self._applied = 0
        self._allowed = 1

    def __call__(self) -> None:
        self._applied += 1
        if self._applied == self._allowed:
            self._applied = 0
            self._allowed += 1
            raise PyambientError("told to fail")


class FailAfter:
    """Fails once, right after so many steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            raise PyambientError("told to fail")


class DieAfter:
    """Ends the process like kill -9 after so many steps, before it can note the last one."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self) -> None:
        self._left -= 1
        if not self._left:
            os._exit(9)


class Fuse:
    """Ends processes by SIGKILL so many steps after it was lit, in whatever process inherited it.

    Not lit, or burnt out, it does nothing.
    """

    def __init__(self, *, agent: bool, proxies: Path | None) -> None:
        """Whether the agent that calls it is to end, and what runs in this cgroup."""
        self._agent = agent
        self._proxies = proxies
        self._left = mmap.mmap(-1, 4)

    @property
    def left(self) -> int:
        """After how many steps more it will happen; 0 if it will not."""
        return int.from_bytes(self._left[:])

    def light(self, steps: int) -> None:
        self._left[:] = steps.to_bytes(4)

    def __call__(self) -> None:
        left = self.left
        self.light(max(left - 1, 0))
        if left == 1:
            if self._proxies is not None:
                _kill_members(self._proxies)
            if self._agent:
                os.kill(os.getpid(), signal.SIGKILL)


def _kill_members(cgroup: Path) -> None:
    """End what runs in a cgroup, and return when it has ended."""
    while pids := (cgroup / "cgroup.procs").read_text().split():
        for pid in map(int, pids):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)


def _run_agent(
    channel: Channel,
    settings: AgentSettings,
    sabotage: Callable[[], None] | None,
    undoing: bool,  # noqa: FBT001 - not called by its name
) -> None:
    log = (settings.run_dir.path / "log").open("a", buffering=1)
    configure("json", "info", lambda line: print(line, file=log))
    if sabotage is not None:
        _call_after_each_step(sabotage)
        if undoing:
            _call_after_each_undone(sabotage)
    with AgentLock(settings.run_dir):
        trio.run(_agent, channel, settings)


def _call_after_each_step(sabotage: Callable[[], None]) -> None:
    apply = interception.apply_stages

    def apply_and_more(pod: Pod, steps: Iterable[Step]) -> tuple[Step, ...]:
        applied = apply(pod, steps)
        sabotage()
        return applied

    interception.apply_stages = apply_and_more


def _call_after_each_undone(sabotage: Callable[[], None]) -> None:
    undo = interception.undo_stages

    def undo_and_more(
        pod: Pod, recorded: Iterable[Step], stages: Collection[Stage] = ALL_STAGES
    ) -> None:
        for stage in sorted(stages, reverse=True):
            for step in reversed(tuple(recorded)):
                if step.stage is stage:
                    undo(pod, (step,))
                    sabotage()

    for module in (interception, enrolment, switch):
        module.undo_stages = undo_and_more


async def _agent(channel: Channel, settings: AgentSettings) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(Agent(settings).run)
        channel.send("ready")
        await trio.lowlevel.wait_readable(channel.fileno())
        nursery.cancel_scope.cancel()


def _run_proxy(
    channel: Channel,
    run_dir: RunDir,
    refusing: frozenset[str],
    *,
    slow_to_drain: bool,
    foreign: bool,
) -> None:
    async def run() -> None:
        proxy = _SmallProxy(channel, refusing)
        if not slow_to_drain:
            proxy.drained.set()
        await proxy.run(run_dir, foreign=foreign)

    trio.run(run)


class _SmallProxy:
    """PodHandler and DetailsHandler, as told by the test."""

    def __init__(self, channel: Channel, refusing: frozenset[str]) -> None:
        self.drained = trio.Event()
        self._channel = channel
        self._refusing = refusing
        self._calls: list[str] = []
        self._names: dict[str, str] = {}
        self._details: dict[str, PodDetails] = {}
        self._listeners: dict[str, list[socket.socket]] = {}
        self._forwarders: dict[str, SmallForwarder] = {}
        self._serving: trio.Nursery | None = None

    async def run(self, run_dir: RunDir, *, foreign: bool) -> None:
        async with trio.open_nursery() as nursery:
            self._serving = nursery
            if not foreign:
                nursery.start_soon(serve_details, run_dir.details_socket, self)
            nursery.start_soon(serve_zds, run_dir.zds_socket, self)
            while True:
                await trio.lowlevel.wait_readable(self._channel.fileno())
                self._channel.send(self._answer(self._channel.receive()))

    def _answer(self, command: str) -> object:
        match command:
            case "calls":
                return [self._named(call) for call in self._calls]
            case "forget":
                self._calls.clear()
            case "drained":
                self.drained.set()
        return True

    def _named(self, call: str) -> str:
        for uid, name in self._names.items():
            call = call.replace(uid, name)
        return call

    async def add(self, pod: PodRef, netns: Netns) -> None:
        self._calls.append(f"add {pod.uid}")
        self._names[pod.uid] = pod.name
        with netns:
            if pod.name in self._refusing:
                raise PyambientError(f"{pod.name} is not wanted")
            backend, ports = "iptables", WELL_KNOWN
            if pod.uid in self._details:
                backend, ports = self._details[pod.uid].backend, self._details[pod.uid].ports
            netfilter = backend in NETFILTER
            self._listeners[pod.uid] = [
                sockets.listener(netns, port, netfilter=netfilter) for port in ports.loops
            ]
            forwarder = SmallForwarder(netns, backend, ports.dns, netfilter=netfilter)
            self._forwarders[pod.uid] = forwarder
        assert self._serving is not None
        self._serving.start_soon(forwarder.serve)

    async def remove(self, uid: str) -> None:
        self._calls.append(f"remove {uid}")
        self._stop(uid)

    async def retain(self, uids: frozenset[str]) -> None:
        self._calls.append(f"retain {' '.join(sorted(uids))}".strip())
        for uid in set(self._listeners) - uids:
            self._stop(uid)

    def _stop(self, uid: str) -> None:
        for listener in self._listeners.pop(uid, ()):
            listener.close()
        if uid in self._forwarders:
            self._forwarders.pop(uid).close()

    async def describe(self, uid: str, details: PodDetails) -> None:
        self._calls.append(f"describe {uid} {details.backend} {' '.join(details.addresses)}")
        self._details[uid] = details
        if uid in self._forwarders:
            self._forwarders[uid].suit(details.backend)

    async def settle(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the protocol's
        self._calls.append(f"settle {uid} {timeout:g}")
        await self.drained.wait()
        return 0

    async def drain(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the protocol's
        self._calls.append(f"drain {uid} {timeout:g}")
        await self.drained.wait()
        return 0

    async def status(self, uid: str) -> dict[str, Any]:
        return {"listeners": len(self._listeners.get(uid, ()))}

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        """Nothing: a proxy that decides about no connection."""
        self._calls.append(f"explain {question.uid} {question.to}")
        return None
