"""The proxy's end of the details channel: a trio client that answers the agent's questions.

Descriptions are taken in their order; what waits (a drain may take half a minute) runs beside
them. A lost connection cancels it; the agent that returns asks again.
"""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from pyambient.errors import PyambientError
from pyambient.observe.logs import get_logger
from pyambient.zds.details import (
    PACKET_LIMIT,
    Answer,
    Describe,
    DetailsError,
    Drain,
    Explain,
    PodDetails,
    Question,
    Settle,
    Status,
    decode_question,
    encode_answer,
)

from .zds_client import keep_connected

MAX_OUTSTANDING: Final = 256
_log = get_logger("details")


class DetailsHandler(Protocol):
    """What answers the agent's questions; a PyambientError or OSError is the answer's error."""

    async def describe(self, uid: str, details: PodDetails) -> None:
        """Note how the pod is intercepted, before its ZDS add and whenever that changes."""

    async def drain(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109  the agent's number, waited out by the proxy
        """Stop accepting, say GOAWAY, wait up to `timeout` seconds; the connections left."""

    async def settle(self, uid: str, timeout: float) -> int:  # noqa: ASYNC109  as in drain
        """Wait up to `timeout` seconds for the present connections to end; those left."""

    async def status(self, uid: str) -> dict[str, Any]:
        """What to show about the pod, as JSON values."""

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        """What would happen to a connection, as JSON values; None for a pod that is not served."""


async def answer_details(connection: trio.socket.SocketType, handler: DetailsHandler) -> bool:
    """Answer the agent at the other end until the connection ends; whether it asked anything."""
    return await _Conversation(connection, handler).run()


async def serve_details(
    path: Path,
    handler: DetailsHandler,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the agent that listens at `path`, for ever; started at once, connected or not."""
    task_status.started()
    await keep_connected(path, partial(answer_details, handler=handler))


class _Conversation:
    """One connection to the agent."""

    def __init__(self, connection: trio.socket.SocketType, handler: DetailsHandler) -> None:
        self._connection = connection
        self._handler = handler
        self._sending = trio.Lock()
        self._room = trio.Semaphore(MAX_OUTSTANDING)

    async def run(self) -> bool:
        """Answer until the connection ends; whether anything was asked."""
        heard = False
        try:
            async with trio.open_nursery() as nursery:
                while packet := await self._receive():
                    heard = True
                    number, question = decode_question(packet)
                    if isinstance(question, Describe):  # comes before what follows it
                        await self._answer(number, question)
                    else:
                        await self._room.acquire()
                        nursery.start_soon(self._wait, number, question)
                nursery.cancel_scope.cancel()
        except* (DetailsError, OSError) as errors:
            _log.warning("lost the agent", error="; ".join(map(str, errors.exceptions)))
        return heard

    async def _receive(self) -> bytes:
        packet, _, flags, _ = await self._connection.recvmsg(PACKET_LIMIT)
        if flags & socket.MSG_TRUNC:
            raise DetailsError("a truncated packet")
        return packet

    async def _wait(self, number: int, question: Question) -> None:
        try:
            await self._answer(number, question)
        finally:
            self._room.release()

    async def _answer(self, number: int, question: Question) -> None:
        try:
            answer = Answer(number, await self._result(question))
        except (PyambientError, OSError) as error:
            answer = Answer(number, error=str(error) or type(error).__name__)
        async with self._sending:
            await self._connection.send(encode_answer(answer))

    async def _result(self, question: Question) -> Any:
        match question:
            case Describe(uid, details):
                return await self._handler.describe(uid, details)
            case Drain(uid, timeout):
                return await self._handler.drain(uid, timeout)
            case Settle(uid, timeout):
                return await self._handler.settle(uid, timeout)
            case Status(uid):
                return await self._handler.status(uid)
            case Explain():
                return await self._handler.explain(question)
