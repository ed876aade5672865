"""The agent's end of ZDS: tells every connected proxy which pods to serve.

General theory of operation
---------------------------
Proxies connect to us. A new one is told of every pod (Add, with a copy of the network namespace's
fd), then SnapshotSent, then what changes. While two are connected (an upgrade: the old one is
draining) an Add goes to the newest alone, a Del to all of them; their listeners share the ports
by SO_REUSEPORT.

A connection that fails (`proxy/zds_peer.py`) is closed: the proxy goes on serving what it serves,
reconnects and gets a snapshot, which puts right whatever was half done.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from pyambient.errors import PyambientError
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger
from pyambient.proxy.zds_peer import EXCHANGE_TIMEOUT, ZdsPeer
from pyambient.zds.messages import Add, Del, SnapshotSent, ZdsError

from .unix_socket import peer_pid, serve

MAX_PROXIES: Final = 16
# How long a proxy's ZDS connection waits for its details connection; a foreign one has none.
INTRODUCTION_TIMEOUT: Final = 1.0
_log = get_logger("zds")


class NoProxy(PyambientError):
    """Nobody is there to serve a pod."""

    def __init__(self) -> None:
        super().__init__(
            "no proxy is connected to the agent",
            "start one with 'pyambient proxy' or 'pyambient up'",
        )


class ZdsServer:
    """The pods to be served, and the proxies that serve them.

    `introduce` is awaited with the pid of a proxy, and for how many seconds to wait, so that the
    details channel can be there first; False is for a proxy of another make, which has none.
    `objection` says why such a proxy, by its pid, cannot serve a pod at all; it is not asked to
    then.
    """

    def __init__(
        self,
        introduce: Callable[[int, float], Awaitable[bool]],
        objection: Callable[[int, str, Netns], Awaitable[PyambientError | None]],
    ) -> None:
        self.proxies: list[ZdsPeer] = []
        self._foreign: set[ZdsPeer] = set()
        self._introduce = introduce
        self._objection = objection
        self._pods: dict[str, tuple[PodRef, Netns]] = {}
        self._arrival = trio.Event()
        self._refused: set[str] = set()
        self._refusal = trio.Event()

    async def serve(
        self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept proxies at `path`, for ever; started when it listens."""
        kind = socket.SOCK_SEQPACKET
        await serve(path, kind, MAX_PROXIES, self._serve_proxy, task_status=task_status)

    async def _serve_proxy(self, connection: trio.socket.SocketType) -> None:
        peer = ZdsPeer(connection, peer_pid(connection))
        self.proxies.append(peer)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._greet, peer)
                await peer.receive_all()
                nursery.cancel_scope.cancel()
        except* ZdsError as errors:
            _log.error("lost the proxy", pid=peer.pid, error=str(errors.exceptions[0]))
        else:
            _log.warning("the proxy hung up", pid=peer.pid)
        finally:
            self.proxies.remove(peer)
            self._foreign.discard(peer)
            peer.close()

    async def _greet(self, peer: ZdsPeer) -> None:
        """The snapshot; what goes wrong with a pod in it is logged, the others go on."""
        with trio.move_on_after(EXCHANGE_TIMEOUT) as waiting:
            await peer.greeted.wait()
        if waiting.cancelled_caught:
            raise ZdsError("it said no hello")
        if not await self._introduce(peer.pid, INTRODUCTION_TIMEOUT):
            self._foreign.add(peer)
        named: set[str] = set()
        kept_back = await self._name_all(peer, named)
        await peer.exchange(SnapshotSent())
        _log.info("a proxy is connected", pid=peer.pid, pods=len(named))
        peer.ready.set()
        self._arrival.set()
        self._arrival = trio.Event()
        # Until now a pod could go to an older proxy alone.
        kept_back |= await self._name_all(peer, named)
        # One of our own make may come late, after an outage of the agent's.
        if peer in self._foreign and await self._introduce(peer.pid, math.inf):
            self._foreign.remove(peer)
            await self._name_all(peer, named - kept_back)

    async def _name_all(self, peer: ZdsPeer, named: set[str]) -> set[str]:
        """Those that it cannot serve."""
        kept_back: set[str] = set()
        while missing := [uid for uid in self._pods if uid not in named]:
            named.add(missing[0])
            if not await self._name(peer, *self._pods[missing[0]]):
                kept_back.add(missing[0])
        return kept_back

    async def _name(self, peer: ZdsPeer, pod: PodRef, netns: Netns) -> bool:
        """Whether it was asked to serve the pod; what comes of it is logged."""
        objection = await self._objection_of(peer, pod, netns)
        if objection is not None:
            _log.error("a pod is not served", pod=str(pod), error=str(objection))
            return False
        ack = await peer.exchange(Add(pod), netns)
        if ack.error:
            _log.error("the proxy cannot serve a pod", pod=str(pod), error=ack.error)
            self._refused.add(pod.uid)
            self._refusal.set()
            self._refusal = trio.Event()
        return True

    async def _objection_of(
        self, peer: ZdsPeer, pod: PodRef, netns: Netns
    ) -> PyambientError | None:
        """Why it is not asked to serve the pod; one of our own make knows the details before."""
        if peer in self._foreign:
            return await self._objection(peer.pid, pod.uid, netns)
        await self._introduce(peer.pid, INTRODUCTION_TIMEOUT)
        return None

    async def refused(self, uid: str) -> None:
        """Wait until a proxy could not serve this pod, in its snapshot or when it was offered."""
        while uid not in self._refused:
            await self._refusal.wait()
        self._refused.remove(uid)

    async def offer(self, uid: str, patience: float) -> None:
        """Ask the newest proxy once more to serve a pod; what comes of it is logged."""
        with contextlib.suppress(NoProxy, ZdsError):
            peer = await self.newest(trio.current_time() + patience)
            if uid in self._pods:
                await self._name(peer, *self._pods[uid])

    def adopt(self, pod: PodRef, netns: Netns) -> None:
        """Have proxies that connect from now on serve the pod."""
        self._pods[pod.uid] = (pod, netns)

    async def add(self, pod: PodRef, netns: Netns, patience: float) -> ZdsPeer:
        """Have the newest proxy serve the pod; return it when its listeners are bound.

        Waits up to `patience` seconds for a proxy. A PyambientError means that none serves it.
        """
        deadline = trio.current_time() + patience
        while True:
            try:
                peer = await self.newest(deadline)
            except NoProxy:
                self._pods.pop(pod.uid, None)
                raise
            if (objection := await self._objection_of(peer, pod, netns)) is not None:
                raise objection
            self._pods[pod.uid] = (pod, netns)
            try:
                ack = await peer.exchange(Add(pod), netns)
            except ZdsError as error:
                _log.warning("the proxy failed during an Add", pid=peer.pid, error=str(error))
                continue
            if not ack.error:
                return peer
            await self.remove(pod.uid)
            raise PyambientError(f"the proxy cannot serve {pod}: {ack.error}")

    async def newest(self, deadline: float) -> ZdsPeer:
        """The proxy that connected last and has its snapshot; NoProxy if there is none in time."""
        with trio.move_on_at(deadline):
            while True:
                for peer in reversed(self.proxies):
                    if peer.ready.is_set() and not peer.closed:
                        return peer
                await self._arrival.wait()
        raise NoProxy

    async def remove(self, uid: str) -> None:
        """Have every proxy stop serving the pod; one that cannot be told gets a new snapshot."""
        self._pods.pop(uid, None)
        self._refused.discard(uid)
        for peer in list(self.proxies):
            if not peer.greeted.is_set():
                continue
            with contextlib.suppress(ZdsError):
                ack = await peer.exchange(Del(uid))
                if ack.error:
                    _log.warning("the proxy cannot stop a pod", uid=uid, error=ack.error)

    def __repr__(self) -> str:
        return f"<ZdsServer {len(self._pods)} pods, {self.proxies}>"
