"""The agent as a program: everything of this room in one nursery."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from pyambient.intercept.loader import use
from pyambient.intercept.node_objects import ahead
from pyambient.observe.logs import get_logger

from .adoption import Adoption
from .api import Api
from .config import AgentSettings
from .enrolled import Enrolled
from .enrolment import Enrolments
from .interception import load_ahead
from .kernel import KernelQueue
from .lock import AgentLock
from .proxies import Proxies
from .reconcile import Rounds
from .records import Record, RecordStore
from .retry import until_done
from .succession import Succession
from .watcher import Fate, watch_existence, watch_network

_log = get_logger("agent")


class Agent:
    """One agent: its enrolments, the proxies it hands them to, and the sockets it is asked at."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._kernel = KernelQueue()
        self._proxies = Proxies(self._kernel)
        store = RecordStore(settings.run_dir.pods)
        self.enrolments = Enrolments(settings, store, self._proxies, self._kernel, self._hold)
        self._adoption = Adoption(self.enrolments, store, self._proxies, self._kernel)
        self._succession = Succession(self.enrolments)
        self._rounds = Rounds(self.enrolments, settings.round_pause)
        self._api = Api(self.enrolments, self._proxies, self._rounds)
        self._watches: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take over what is enrolled and serve for ever; started when the sockets listen."""
        run_dir = self._settings.run_dir
        async with trio.open_nursery() as nursery:
            self._watches = nursery
            await self._adoption.adopt_all()
            await nursery.start(self._proxies.serve, run_dir)
            await nursery.start(self._api.serve, run_dir.agent_socket)
            nursery.start_soon(self._rounds.run)
            nursery.start_soon(self._kernel.run, load_ahead, self._settings.site)
            for record in self._adoption.unfinished:
                nursery.start_soon(self._succeed, record)
            _log.info("ready", run_dir=str(run_dir.path), pods=len(self.enrolments.all()))
            task_status.started()

    def _hold(self, enrolled: Enrolled) -> None:
        if self._watches is not None:
            self._watches.start_soon(self._watch, enrolled)

    async def _watch(self, enrolled: Enrolled) -> None:
        """Follow the pod until it is freed; a bug met by one pod spares the others."""
        if enrolled.freed.is_set():
            return
        try:
            async with trio.open_nursery() as nursery:
                refresh = partial(self.enrolments.upkeep.refresh, enrolled)
                inspect = partial(self.enrolments.upkeep.inspect, enrolled)
                nursery.start_soon(watch_network, enrolled, refresh, inspect)
                nursery.start_soon(self._free_when_gone, enrolled)
                nursery.start_soon(self._free, enrolled, self.enrolments.resume)
                nursery.start_soon(self.enrolments.switch.follow, enrolled)
                nursery.start_soon(self.enrolments.relocation.follow, enrolled)
                await enrolled.freed.wait()
                nursery.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is in the log
            _log.error("internal error, a pod is not watched", pod=repr(enrolled), exc_info=error)

    async def _free_when_gone(self, enrolled: Enrolled) -> None:
        fate = Fate(replaced=False, gone=False)
        while not fate.gone:
            fate = await watch_existence(enrolled, fate)
            if fate.replaced:
                await self._succession.follow(enrolled.record)
        _log.warning("the network namespace is gone", pod=str(enrolled.record.pod))
        await self._free(enrolled, partial(self.enrolments.unenrol, drain_timeout=0))

    async def _succeed(self, record: Record) -> None:
        """What a former agent enrolled is gone: enrol its replacement, and then clean up."""
        await self._succession.follow(record)
        await self._until_done(record, partial(self._adoption.clean_up, record))

    async def _free(
        self, enrolled: Enrolled, action: Callable[[Enrolled], Awaitable[object]]
    ) -> None:
        await self._until_done(enrolled.record, partial(action, enrolled))

    async def _until_done(self, record: Record, action: Callable[[], Awaitable[object]]) -> None:
        """Free a pod, which nobody waits for."""

        def say(reason: str) -> None:
            _log.error("cannot free a pod", pod=str(record.pod), error=reason)

        await until_done(action, self._settings.round_pause, say)

    def __repr__(self) -> str:
        return f"<Agent in {self._settings.run_dir.path} {self.enrolments!r}>"


def run(settings: AgentSettings) -> None:
    """Run an agent until SIGINT or SIGTERM; pods stay enrolled."""
    use(settings.bpf_loader)
    settings.run_dir.prepare()
    with AgentLock(settings.run_dir), contextlib.closing(ahead):
        trio.run(_run, settings)


async def _run(settings: AgentSettings) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Agent(settings).run)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()
    _log.info("stopped; pods stay enrolled")
