"""The agent's end of the details channel: describes pods to the proxies and has them drained.

A proxy of another make never connects here. Nothing in this file fails because of that: there is
just nobody to describe a pod to, and nothing to wait for when it drains.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import trio

from pyambient.observe.logs import get_logger
from pyambient.proxy.details_peer import DetailsPeer
from pyambient.proxy.zds_peer import EXCHANGE_TIMEOUT
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

from .unix_socket import peer_pid, serve
from .zds_server import MAX_PROXIES

_log = get_logger("details")


class DetailsServer:
    """What is known of the pods, and the proxies that want to know it.

    Those that are `_coming` are just being told.
    """

    def __init__(self) -> None:
        self._described: dict[str, PodDetails] = {}
        self._coming: list[DetailsPeer] = []
        self._peers: list[DetailsPeer] = []
        self._change = trio.Event()

    async def serve(
        self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept proxies at `path`, for ever; started when it listens."""
        kind = socket.SOCK_SEQPACKET
        await serve(path, kind, MAX_PROXIES, self._serve_proxy, task_status=task_status)

    async def _serve_proxy(self, connection: trio.socket.SocketType) -> None:
        peer = DetailsPeer(connection, peer_pid(connection))
        self._coming.append(peer)
        self._note_change()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._greet, peer)
                await peer.receive_all()
                nursery.cancel_scope.cancel()
        except* DetailsError as errors:
            _log.warning("lost the proxy", pid=peer.pid, error=str(errors.exceptions[0]))
        finally:
            (self._peers if peer in self._peers else self._coming).remove(peer)
            self._note_change()
            peer.close()

    def _note_change(self) -> None:
        """Wake up those who wait for a proxy."""
        self._change.set()
        self._change = trio.Event()

    async def _greet(self, peer: DetailsPeer) -> None:
        told: dict[str, PodDetails] = {}
        while missing := {u: d for u, d in self._described.items() if told.get(u) != d}:
            uid, details = next(iter(missing.items()))
            told[uid] = details
            await peer.ask(Describe(uid, details))
        self._coming.remove(peer)
        self._peers.append(peer)
        self._note_change()

    async def introduced(self, pid: int, patience: float) -> bool:
        """Whether the proxy with this pid has come within `patience` s.

        One that has is waited for until it knows what is known of the pods, or has hung up.
        """
        with trio.move_on_after(patience) as waiting:
            while not any(peer.pid == pid for peer in (*self._coming, *self._peers)):
                await self._change.wait()
        while any(peer.pid == pid for peer in self._coming):
            await self._change.wait()
        return not waiting.cancelled_caught

    def described(self, uid: str) -> PodDetails | None:
        return self._described.get(uid)

    async def describe(self, uid: str, details: PodDetails) -> None:
        """Tell every proxy how the pod is intercepted, now and when another one connects."""
        self._described[uid] = details
        for peer in list(self._peers):
            await self._ask(peer, Describe(uid, details), EXCHANGE_TIMEOUT)

    def forget(self, uid: str) -> None:
        self._described.pop(uid, None)

    async def drain(self, uid: str, timeout: float) -> int | None:  # noqa: ASYNC109  the proxy waits it out, in an answer that says what is left
        """Have the proxies finish the pod's connections; how many are left after `timeout` s.

        None if no proxy could be asked.
        """
        return await self._ask_all(Drain(uid, timeout), timeout)

    async def _ask_all(self, question: Question, timeout: float) -> int | None:  # noqa: ASYNC109  as in drain
        """The sum of the numbers that the proxies answer; None if none does."""
        numbers: list[int] = []

        async def ask(peer: DetailsPeer) -> None:
            answer = await self._ask(peer, question, timeout + EXCHANGE_TIMEOUT)
            if isinstance(answer, int):
                numbers.append(answer)

        async with trio.open_nursery() as nursery:
            for peer in self._peers:
                nursery.start_soon(ask, peer)
        return sum(numbers) if numbers else None

    async def settle(self, uid: str, timeout: float) -> int | None:  # noqa: ASYNC109  as in drain
        """Wait until the pod's present connections have ended; those left after `timeout` s.

        None if no proxy could be asked.
        """
        return await self._ask_all(Settle(uid, timeout), timeout)

    async def status(self, uid: str) -> dict[str, Any] | None:
        """What the newest proxy says about the pod; None if there is none to ask."""
        return await self._newest(Status(uid))

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        """What the newest proxy would do to a connection; None if none can say."""
        return await self._newest(question)

    async def _newest(self, question: Question) -> dict[str, Any] | None:
        for peer in reversed(self._peers):
            answer = await self._ask(peer, question, EXCHANGE_TIMEOUT)
            if isinstance(answer, dict):
                return answer
        return None

    async def _ask(self, peer: DetailsPeer, question: Question, patience: float) -> Any:
        try:
            return await peer.ask(question, patience)
        except DetailsError as error:
            _log.warning("the proxy failed", pid=peer.pid, asked=str(question), error=str(error))
            return None

    def __repr__(self) -> str:
        return f"<DetailsServer {len(self._described)} pods, {self._peers}>"
