"""One worker of several, as their parent has it: its process, and the two connections to it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from pyambient.children import Child, module, start
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger
from pyambient.zds.details import DetailsError, PodDetails, Question
from pyambient.zds.messages import Ack, Request, ZdsError

from .details_peer import DetailsPeer
from .settings import ProxySettings, Seat
from .zds_peer import ZdsPeer

# Less than the agent's own patience: it is told what a worker failed at, and does not hang up.
ANSWER_PATIENCE: Final = 4.0
_START_PATIENCE: Final = 60.0
# Beyond what a worker takes to drain.
_STOP_PATIENCE: Final = 3.0
_log = get_logger("workers")


@dataclass(eq=False)
class Link:
    """The connections to one process of a worker, and what it has been told.

    `ready` once it knows all pods, and is told of each that comes.
    """

    pid: int
    zds: ZdsPeer
    details: DetailsPeer
    ready: bool = False
    described: dict[str, PodDetails] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)

    def forget(self, uid: str) -> None:
        self.described.pop(uid, None)
        self.named.discard(uid)

    async def exchange(self, request: Request, netns: Netns | None = None) -> Ack:
        """As `ZdsPeer.exchange`; `netns` may be closed meanwhile.

        It is not cancelled, which would end the connection and with it the worker: the agent may
        go away at any time.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(trio.CancelScope(shield=True))
            copy = None if netns is None else stack.enter_context(netns.duplicate())
            return await self.zds.exchange(request, copy)

    async def ask(self, question: Question, patience: float = ANSWER_PATIENCE) -> Any:
        return await self.details.ask(question, patience)

    def close(self) -> None:
        self.zds.close()
        self.details.close()


class WorkerProcess:
    """A worker, started again whenever it ends.

    `greet` is awaited with each process's link, to make it ready. One that ends before
    `started` is set is a ChildFailed.
    """

    def __init__(
        self,
        number: int,
        settings: ProxySettings,
        greet: Callable[[Link], Awaitable[None]],
        started: trio.Event,
    ) -> None:
        self.number = number
        self.link: Link | None = None
        self.up = trio.Event()
        self._settings = settings
        self._greet = greet
        patience = settings.drain_timeout + _STOP_PATIENCE
        self._child = Child(f"worker {number}", self._begin, patience, started, _log.warning)
        self._conversations: trio.Nursery | None = None

    async def run(self) -> None:
        """Keep it running until cancelled; then it drains, and is waited for."""
        async with trio.open_nursery() as nursery:
            self._conversations = nursery
            await self._child.keep_running()

    def _begin(self) -> subprocess.Popen[bytes]:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            zds, zds_there = _pair(ours, theirs)
            details, details_there = _pair(ours, theirs)
            seat = Seat(self.number, os.getpid(), zds_there.fileno(), details_there.fileno())
            line = module("pyambient.proxy", self._settings.to_json(), *seat.words())
            process = start(line, (seat.zds, seat.details))
            ours.pop_all()
        over_zds, over_details = map(trio.socket.from_stdlib_socket, (zds, details))
        link = self.link = Link(
            process.pid,
            ZdsPeer(over_zds, process.pid, ANSWER_PATIENCE),
            DetailsPeer(over_details, process.pid),
        )
        assert self._conversations is not None  # noqa: S101 - it begins in `run`
        self._conversations.start_soon(self._converse, link, process)
        return process

    async def _converse(self, link: Link, process: subprocess.Popen[bytes]) -> None:
        """Until one of the connections is over; a process without both is of no use."""
        try:
            async with trio.open_nursery() as nursery:

                async def listen(receive_all: Callable[[], Awaitable[None]]) -> None:
                    await receive_all()
                    process.terminate()  # it would serve on, and hear of no pod that goes
                    nursery.cancel_scope.cancel()

                nursery.start_soon(listen, link.zds.receive_all)
                nursery.start_soon(listen, link.details.receive_all)
                with trio.fail_after(_START_PATIENCE):
                    await link.zds.greeted.wait()
                await self._greet(link)
                self.up.set()
        except* (ZdsError, DetailsError, OSError, trio.TooSlowError) as errors:
            reason = str(errors.exceptions[0]) or "it does not start"
            _log.warning("lost a worker", number=self.number, pid=link.pid, error=reason)
            process.kill()
        finally:
            link.close()
            link.ready = False
            if self.link is link:
                self.link = None

    def __repr__(self) -> str:
        return f"<WorkerProcess {self.number} {self._child!r}>"


def _pair(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[socket.socket, socket.socket]:
    """A connection, each end of it to be closed by its owner."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return ours.enter_context(here), theirs.enter_context(there)
