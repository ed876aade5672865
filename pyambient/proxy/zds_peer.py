"""The other end of a proxy's ZDS connection: the agent's, and that of a parent of workers.

A connection has one outstanding message and five seconds for its ack, as in istio-cni. Anything
out of turn closes it.
"""

from __future__ import annotations

import array
import socket
from typing import Final

import trio

from pyambient.netns import Netns
from pyambient.zds.messages import BUFFER_SIZE, Ack, Hello, Request, ZdsError
from pyambient.zds.session import AgentSession

EXCHANGE_TIMEOUT: Final = 5.0


class ZdsPeer:
    """One connected proxy; an answer may take `patience` seconds."""

    def __init__(
        self, connection: trio.socket.SocketType, pid: int, patience: float = EXCHANGE_TIMEOUT
    ) -> None:
        self.pid = pid
        self.closed = False
        self.greeted = trio.Event()
        self.ready = trio.Event()
        self._connection = connection
        self._patience = patience
        self._session = AgentSession()
        self._turn = trio.Lock()
        self._acks, self._answers = trio.open_memory_channel[Ack](1)

    async def exchange(self, request: Request, netns: Netns | None = None) -> Ack:
        """Send `request` in its turn and wait for its ack; ZdsError when the connection is over.

        Whatever goes wrong ends the connection: an ack that is missing would be taken for the
        next request's.
        """
        async with self._turn:
            try:
                with trio.fail_after(self._patience):
                    await self._send(self._session.request(request), netns)
                    return await self._answers.receive()
            except BaseException as error:
                self.close()
                if isinstance(error, trio.TooSlowError):
                    raise ZdsError("it did not answer in time") from None
                if isinstance(error, (trio.EndOfChannel, trio.ClosedResourceError, OSError)):
                    raise ZdsError("it hung up") from None
                raise

    async def _send(self, packet: bytes, netns: Netns | None) -> None:
        ancillary = []
        if netns is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [netns.fd]))]
        await self._connection.sendmsg([packet], ancillary)

    async def receive_all(self) -> None:
        """Pass on what the proxy says until it hangs up; ZdsError for what is out of turn."""
        try:
            while packet := await self._connection.recv(BUFFER_SIZE):
                match self._session.receive(packet):
                    case Hello():
                        self.greeted.set()
                    case Ack() as ack:
                        self._acks.send_nowait(ack)
        except (OSError, trio.ClosedResourceError) as error:
            raise ZdsError(str(error)) from None
        finally:
            self.close()

    def close(self) -> None:
        self.closed = True
        self._connection.close()
        self._acks.close()

    def __repr__(self) -> str:
        return f"<ZdsPeer pid {self.pid} {self._session!r}>"
