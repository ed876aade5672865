"""The other end of a proxy's details connection: the agent's, and that of a parent of workers."""

from __future__ import annotations

import itertools
import socket
from typing import Any

import trio

from pyambient.zds.details import (
    PACKET_LIMIT,
    Answer,
    DetailsError,
    Question,
    decode_answer,
    encode_question,
)

from .zds_peer import EXCHANGE_TIMEOUT


class DetailsPeer:
    """One connected proxy."""

    def __init__(self, connection: trio.socket.SocketType, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._numbers = itertools.count(1)
        self._waiting: dict[int, trio.MemorySendChannel[Answer]] = {}
        self._sending = trio.Lock()

    async def ask(self, question: Question, patience: float = EXCHANGE_TIMEOUT) -> Any:
        """The proxy's result; DetailsError if it refuses, is silent for `patience` s or leaves."""
        number = next(self._numbers)
        answers, answer = trio.open_memory_channel[Answer](1)
        self._waiting[number] = answers
        try:
            with trio.fail_after(patience):
                async with self._sending:
                    await self._connection.send(encode_question(number, question))
                answered = await answer.receive()
        except trio.TooSlowError:
            raise DetailsError("it did not answer in time") from None
        except (OSError, trio.EndOfChannel, trio.ClosedResourceError):
            raise DetailsError("it hung up") from None
        finally:
            self._waiting.pop(number, None)
        if answered.error:
            raise DetailsError(answered.error)
        return answered.result

    async def receive_all(self) -> None:
        """Pass on the proxy's answers until it hangs up."""
        try:
            while packet := await self._receive():
                answer = decode_answer(packet)
                # An answer that nobody waits for any more came after its patience.
                if (waiting := self._waiting.get(answer.id)) is not None:
                    waiting.send_nowait(answer)
        except (OSError, trio.ClosedResourceError):
            raise DetailsError("it hung up") from None
        finally:
            self.close()

    async def _receive(self) -> bytes:
        packet, _, flags, _ = await self._connection.recvmsg(PACKET_LIMIT)
        if flags & socket.MSG_TRUNC:
            raise DetailsError("a packet longer than the limit")
        return packet

    def close(self) -> None:
        self._connection.close()
        for waiting in self._waiting.values():
            waiting.close()

    def __repr__(self) -> str:
        return f"<DetailsPeer pid {self.pid} {len(self._waiting)} questions>"
