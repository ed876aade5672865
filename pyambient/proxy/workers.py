"""Several workers as one proxy: what the agent says goes to each of them, and one answer back.

General theory of operation
---------------------------
A worker is a whole proxy, with listeners of its own in every pod; the kernel deals new connections
out to them. Their parent has the connections to the agent and passes everything on, over ZDS and
the details channel again: to a worker it is the agent. So it keeps what a worker that is started
again has to be told: the pods, each with its network namespace, and their details.

A pod's add is acknowledged when every worker that is up listens in it. If one cannot, the pod is
taken from the others again. A worker that is down is told when it is back; until then the others
have its share, and what it held is lost. A pod that drains is not given to it any more.

A worker accepts nothing before its snapshot is complete (`pods.py` says why), and that is not
before the agent's own is.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import trio

from pyambient.errors import PyambientError
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger
from pyambient.zds.details import (
    Describe,
    DetailsError,
    Drain,
    Explain,
    PodDetails,
    Question,
    Settle,
    Status,
)
from pyambient.zds.messages import Ack, Add, Del, SnapshotSent, ZdsError

from .settings import ProxySettings
from .worker_process import ANSWER_PATIENCE, Link, WorkerProcess
from .zds_client import START_FAILURE

_T = TypeVar("_T")
_log = get_logger("workers")


class Workers:
    """All of them: ZDS's PodHandler and the details channel's DetailsHandler."""

    def __init__(self, settings: ProxySettings) -> None:
        self._started = trio.Event()
        self._processes = [
            WorkerProcess(number, settings, self._greet, self._started)
            for number in range(settings.workers)
        ]
        self._pods: dict[str, tuple[PodRef, Netns]] = {}
        self._details: dict[str, PodDetails] = {}
        self._draining: set[str] = set()
        self._all_named = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep all running until cancelled; started when all are up, ChildFailed if one is not.

        The first goes ahead: what none can use (the mesh file, the CA's directory) is said once.
        """
        async with trio.open_nursery() as nursery:
            for batch in (self._processes[:1], self._processes[1:]):
                for process in batch:
                    nursery.start_soon(process.run)
                for process in batch:
                    await process.up.wait()
            self._started.set()
            task_status.started()

    async def _greet(self, link: Link) -> None:
        """Tell a worker that has just started all that its like know.

        What comes up from then on goes to it as well.
        """
        await self._tell_untold(link)
        link.ready = True
        if self._all_named:
            await link.exchange(SnapshotSent())

    async def _tell_untold(self, link: Link) -> None:
        while True:
            undescribed = [u for u, d in self._details.items() if link.described.get(u) != d]
            unnamed = [u for u in self._pods if u not in link.named | self._draining]
            if undescribed:
                await self._describe_to(link, undescribed[0])
            elif unnamed:
                pod, netns = self._pods[unnamed[0]]
                link.named.add(pod.uid)
                ack = await link.exchange(Add(pod), netns)
                if ack.error:
                    _log.error("a worker cannot serve a pod", pod=str(pod), error=ack.error)
            else:
                return

    @property
    def _links(self) -> list[Link]:
        """The workers that know all pods."""
        links = (process.link for process in self._processes)
        return [link for link in links if link is not None and link.ready]

    @staticmethod
    async def _each(
        links: Iterable[Link], tell: Callable[[Link], Awaitable[_T]]
    ) -> dict[Link, _T | Exception]:
        """What each worker says, or how it failed."""
        said: dict[Link, _T | Exception] = {}

        async def ask(link: Link) -> None:
            try:
                said[link] = await tell(link)
            except (ZdsError, DetailsError, OSError) as error:
                _log.warning("a worker failed", pid=link.pid, error=str(error))
                said[link] = error

        async with trio.open_nursery() as nursery:
            for link in links:
                nursery.start_soon(ask, link)
        return said

    # zds_client.PodHandler

    async def add(self, pod: PodRef, netns: Netns) -> None:
        """Have every worker that is up serve `pod` in `netns`, which is taken over."""
        if (former := self._pods.pop(pod.uid, None)) is not None:
            former[1].close()
        self._pods[pod.uid] = (pod, netns)
        self._draining.discard(pod.uid)
        try:
            await self._add_to_all(pod, netns)
        except BaseException:
            await self._withdraw(pod.uid)
            raise

    async def _add_to_all(self, pod: PodRef, netns: Netns) -> None:
        async def add_to(link: Link) -> Ack:
            await self._describe_to(link, pod.uid)
            link.named.add(pod.uid)
            return await link.exchange(Add(pod), netns)

        said = await self._each(self._links, add_to)
        acks = [answer for answer in said.values() if isinstance(answer, Ack)]
        if not acks:
            raise PyambientError("no worker of the proxy runs", "see its log")
        for ack in acks:
            if ack.error:
                raise PyambientError(ack.error.removeprefix(START_FAILURE))

    async def remove(self, uid: str) -> None:
        """Have every worker stop serving a pod."""
        await self._withdraw(uid)
        self._details.pop(uid, None)

    async def _withdraw(self, uid: str) -> None:
        if (entry := self._pods.pop(uid, None)) is not None:
            entry[1].close()
        self._draining.discard(uid)
        links = [p.link for p in self._processes if p.link is not None]
        greeted = [link for link in links if link.zds.greeted.is_set()]
        for link in greeted:
            link.forget(uid)
        await self._each(greeted, lambda link: link.exchange(Del(uid)))

    async def retain(self, uids: frozenset[str]) -> None:
        """The agent has named all its pods: stop the others, and let workers accept."""
        for uid in set(self._pods) - uids:
            await self.remove(uid)
        if not self._all_named:
            self._all_named = True
            await self._each(self._links, lambda link: link.exchange(SnapshotSent()))

    # details_client.DetailsHandler

    async def describe(self, uid: str, details: PodDetails) -> None:
        """Note how a pod is intercepted, before its add and whenever that changes."""
        self._details[uid] = details
        await self._each(self._links, lambda link: self._describe_to(link, uid))

    async def _describe_to(self, link: Link, uid: str) -> None:
        """Tell a worker, if it does not know. One that ends meanwhile is told when it is back."""
        details = self._details.get(uid)
        if details is None or link.described.get(uid) == details:
            return
        with trio.CancelScope(shield=True):  # the agent may go away at any time
            await link.ask(Describe(uid, details))
        link.described[uid] = details

    async def drain(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the operator's number
        """Drain a pod in all workers; the number of connections left when the time was up."""
        self._draining.add(uid)
        return await self._sum(Drain(uid, timeout), timeout)

    async def settle(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109 - the operator's number
        """Let a pod's present connections end; the number left when the time was up."""
        return await self._sum(Settle(uid, timeout), timeout)

    async def _sum(self, question: Question, timeout: float) -> int:  # noqa: ASYNC109 - as above
        patience = timeout + ANSWER_PATIENCE
        said = await self._each(self._links, lambda link: link.ask(question, patience))
        return sum(left for left in said.values() if isinstance(left, int))

    async def status(self, uid: str) -> dict[str, Any]:
        """What the workers say together, and how many connections each has.

        A worker that is down has no pid.
        """
        if uid not in self._pods:
            return {}
        said = await self._each(self._links, lambda link: link.ask(Status(uid)))
        answers = {link: answer for link, answer in said.items() if isinstance(answer, dict)}
        rows = [self._row(process, answers) for process in self._processes]
        return {**functools.reduce(_joined, answers.values(), {}), "workers": rows}

    @staticmethod
    def _row(process: WorkerProcess, answers: dict[Link, dict[str, Any]]) -> dict[str, Any]:
        link = process.link
        answer = {} if link is None else answers.get(link, {})
        pid = link.pid if link is not None and answer else None
        return {"number": process.number, "pid": pid, "connections": answer.get("connections", 0)}

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        """What would happen to a connection of or to a pod: the same in each worker."""
        for link in self._links:
            said = await self._each([link], lambda one: one.ask(question))
            answer = said[link]
            if isinstance(answer, dict):
                return answer
        return None

    def __repr__(self) -> str:
        return f"<Workers {len(self._links)} of {len(self._processes)} up, {len(self._pods)} pods>"


def _joined(one: Any, other: Any) -> Any:
    """What two workers say, as one: sums of numbers, the earlier of two dates, all that is so."""
    match one, other:
        case (None, value) | (value, None):
            return value
        case bool(), bool():
            return one or other
        case int(), int():
            return one + other
        case dict(), dict():
            return {key: _joined(one.get(key), other.get(key)) for key in one | other}
    return min(one, other)
