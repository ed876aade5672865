"""The proxy's end of ZDS: a trio client that starts and stops pods as the agent says.

General theory of operation
---------------------------
The agent listens, we connect (again and again: an agent that restarts must not touch traffic, so
a lost connection stops nothing). Requests are carried out one at a time and each is acknowledged
once, in order, whether or not it worked; `zds.session` keeps the rules of the protocol.

A pod that could not be started is acknowledged with an error and tried again every five seconds,
as ztunnel does: an agent that gives the pod up sends Del, one that does not expects us to go on.
The network namespace of such a pod is kept open for that; a lost connection lets go of it.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import trio

from pyambient.errors import PyambientError
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger
from pyambient.zds.messages import BUFFER_SIZE, Add, Del, Keep, Request, SnapshotSent, ZdsError
from pyambient.zds.session import ProxySession

FIRST_RETRY: Final = 0.02
LAST_RETRY: Final = 15.0
PENDING_RETRY: Final = 5.0
START_FAILURE: Final = "failure to start proxy : "
# More than one is an error already; room for a few lets us close what was passed.
_DESCRIPTOR_ROOM: Final = 8
_log = get_logger("zds")


class PodHandler(Protocol):
    """What carries out the agent's requests."""

    async def add(self, pod: PodRef, netns: Netns) -> None:
        """Serve `pod`; return when its listeners are bound. Takes over `netns`.

        A PyambientError or OSError becomes the error of the ack.
        """

    async def remove(self, uid: str) -> None:
        """Stop serving the pod; an unknown uid is no error."""

    async def retain(self, uids: frozenset[str]) -> None:
        """Stop serving every pod but these: the agent has named them all."""


@dataclass(frozen=True, slots=True)
class _Received:
    """One packet, the file descriptors that came with it, and whether some of it was cut off."""

    packet: bytes
    descriptors: tuple[int, ...]
    truncated: bool


async def serve_zds(
    path: Path,
    handler: PodHandler,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Obey the agent that listens at `path`, for ever; started at once, connected or not."""
    task_status.started()
    client = ZdsClient(handler)

    async def converse(connection: trio.socket.SocketType) -> bool:
        _log.info("connected to the agent")
        heard = await client.converse(connection)
        _log.info("the agent is gone; its pods go on being served")
        return heard

    await keep_connected(path, converse)


async def keep_connected(
    path: Path, converse: Callable[[trio.socket.SocketType], Awaitable[bool]]
) -> None:
    """Connect to the SOCK_SEQPACKET socket at `path` and converse, again and again, for ever.

    The pause before the next try doubles from 20 ms to 15 s (ztunnel's own numbers); `converse`
    returns whether the agent had anything to say, and then it starts over.
    """
    delay = FIRST_RETRY
    while True:
        heard = False
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            try:
                await connection.connect(str(path))
            except OSError as error:
                _log.debug("the agent does not answer", path=str(path), error=str(error))
            else:
                heard = await converse(connection)
        delay = FIRST_RETRY if heard else min(delay * 2, LAST_RETRY)
        await trio.sleep(delay)


class ZdsClient:
    """The pods the agent has named, across connections."""

    def __init__(self, handler: PodHandler) -> None:
        self._handler = handler
        self._served: dict[str, tuple[int, int]] = {}
        self._pending: dict[str, tuple[PodRef, Netns]] = {}
        self._turn = trio.Lock()

    async def converse(self, connection: trio.socket.SocketType) -> bool:
        """Obey the agent at the other end until the connection ends; whether it said anything."""
        session = ProxySession()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._retry_pending)
                await self._converse(connection, session)
                nursery.cancel_scope.cancel()
        except* (ZdsError, OSError) as errors:
            _log.error("lost the agent", error="; ".join(map(str, errors.exceptions)))
        finally:
            self._forget_pending(list(self._pending))
        return session.heard

    async def _converse(self, connection: trio.socket.SocketType, session: ProxySession) -> None:
        await connection.send(session.hello())
        while (received := await _receive(connection)) is not None:
            try:
                error = await self._obey(session, received)
            except ZdsError as broken:
                await connection.send(session.acknowledge(f"failure to process message : {broken}"))
                raise
            await connection.send(session.acknowledge(error))

    async def _obey(self, session: ProxySession, received: _Received) -> str:
        """Carry out one request; the text of its ack."""
        try:
            request = session.receive(received.packet, len(received.descriptors))
            _check_whole(received)
            netns = _netns(request, received.descriptors)
        except PyambientError as error:
            return f"{START_FAILURE}{error}"
        finally:
            _close(received.descriptors)
        async with self._turn:
            return await self._carry_out(session, request, netns)

    async def _carry_out(self, session: ProxySession, request: Request, netns: Netns | None) -> str:
        match request:
            case Add(pod) if netns is not None:
                return await self._add(pod, netns)
            case Del(uid) if session.live:
                await self._remove(uid)
            case SnapshotSent():
                await self._retain(frozenset(session.named))
            case Add() | Keep() | Del():
                # Before the snapshot is complete a name is only noted, by the session.
                pass
        return ""

    async def _add(self, pod: PodRef, netns: Netns) -> str:
        if self._served.get(pod.uid) == netns.key:
            netns.close()
            return ""
        self._served.pop(pod.uid, None)
        self._forget_pending([pod.uid])
        error = await self._start(pod, netns)
        return f"{START_FAILURE}{error}" if error else ""

    async def _start(self, pod: PodRef, netns: Netns) -> str:
        """Have the pod served, or note it for another try; what went wrong, or nothing."""
        spare = netns.duplicate()
        try:
            await self._handler.add(pod, netns)
        except (PyambientError, OSError) as error:
            self._pending[pod.uid] = (pod, spare)
            _log.warning("cannot serve the pod", pod=str(pod), error=str(error))
            return str(error)
        except BaseException:
            spare.close()
            raise
        self._served[pod.uid] = spare.key
        spare.close()
        return ""

    async def _remove(self, uid: str) -> None:
        self._forget_pending([uid])
        self._served.pop(uid, None)
        await self._handler.remove(uid)  # of one that could not be served, too, what it was told

    async def _retain(self, uids: frozenset[str]) -> None:
        self._forget_pending([uid for uid in self._pending if uid not in uids])
        self._served = {uid: key for uid, key in self._served.items() if uid in uids}
        await self._handler.retain(uids)

    async def _retry_pending(self) -> None:
        while True:
            await trio.sleep(PENDING_RETRY)
            async with self._turn:
                for uid in list(self._pending):
                    pod, netns = self._pending.pop(uid)
                    await self._start(pod, netns)

    def _forget_pending(self, uids: Iterable[str]) -> None:
        for uid in uids:
            if (entry := self._pending.pop(uid, None)) is not None:
                entry[1].close()

    def __repr__(self) -> str:
        return f"<ZdsClient {len(self._served)} pods served, {len(self._pending)} pending>"


async def _receive(connection: trio.socket.SocketType) -> _Received | None:
    """The next packet; None at the end of the connection."""
    packet, ancillary, flags, _ = await connection.recvmsg(
        BUFFER_SIZE,
        socket.CMSG_SPACE(_DESCRIPTOR_ROOM * array.array("i").itemsize),
        socket.MSG_CMSG_CLOEXEC,
    )
    descriptors = tuple(_descriptors(ancillary))
    if not packet:
        _close(descriptors)
        return None
    truncated = bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))
    return _Received(packet, descriptors, truncated)


def _descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterable[int]:
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            passed = array.array("i")
            passed.frombytes(data[: len(data) - len(data) % passed.itemsize])
            yield from passed


def _check_whole(received: _Received) -> None:
    if received.truncated:
        raise ZdsError("a truncated packet")


def _netns(request: Request, descriptors: tuple[int, ...]) -> Netns | None:
    """The network namespace that an Add carries, checked to be one."""
    if not isinstance(request, Add):
        return None
    netns = Netns.open(f"fd:{descriptors[0]}")
    netns.name = str(request.pod)
    return netns


def _close(descriptors: tuple[int, ...]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
