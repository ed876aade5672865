"""All that enrolment wants of the proxy, over both of its channels."""

from __future__ import annotations

from typing import Any

import trio

from pyambient.errors import PyambientError
from pyambient.intercept.holders import holders
from pyambient.model.numbers import DNS_PORT
from pyambient.model.workload import PodRef
from pyambient.netns import Netns
from pyambient.zds.details import Explain, PodDetails

from .config import RunDir
from .details_server import DetailsServer
from .kernel import KernelQueue
from .zds_server import ZdsServer


class Proxies:
    """The connected proxies, old and new, as one that serves pods."""

    def __init__(self, kernel: KernelQueue) -> None:
        self._kernel = kernel
        self._details = DetailsServer()
        self._zds = ZdsServer(self._details.introduced, self._objection)

    async def _objection(self, pid: int, uid: str, netns: Netns) -> PyambientError | None:
        """One of another make listens on the well-known ports, and is told of no others."""
        details = self._details.described(uid)
        if details is None:
            return None
        taken = [p for p in details.ports.moved if p != DNS_PORT or details.dns is not None]
        if not taken:
            return None
        by = await self._kernel.run(holders, netns, taken[0])
        return PyambientError(
            f"port {taken[0]} of {netns.name} is taken by {by}, and the proxy (pid {pid}) can"
            " listen on no other",
            "stop what has it, or serve the pod by 'pyambient proxy'",
        )

    async def serve(
        self, run_dir: RunDir, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept proxies for ever; started when both sockets listen."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._details.serve, run_dir.details_socket)
            await nursery.start(self._zds.serve, run_dir.zds_socket)
            task_status.started()

    @property
    def pids(self) -> list[int]:
        """The proxies that know all pods, the newest last."""
        return [peer.pid for peer in self._zds.proxies if peer.ready.is_set()]

    async def serving(self, uid: str) -> list[int]:
        """All processes that may have the pod's listeners: the proxies, and workers of theirs."""
        status = await self._details.status(uid) or {}
        workers = [worker["pid"] for worker in status.get("workers", ())]
        return [*self.pids, *filter(None, workers)]

    async def newest(self, patience: float) -> int:
        """The pid of the newest proxy that knows all pods; NoProxy if none does in `patience` s."""
        return (await self._zds.newest(trio.current_time() + patience)).pid

    async def adopt(self, pod: PodRef, netns: Netns, details: PodDetails) -> None:
        """Have the pod served by whoever connects."""
        await self._details.describe(pod.uid, details)
        self._zds.adopt(pod, netns)

    async def start(self, pod: PodRef, netns: Netns, details: PodDetails, patience: float) -> int:
        """Have the newest proxy bind the pod's listeners, within `patience` s; the proxy's pid."""
        await self._details.describe(pod.uid, details)
        peer = await self._zds.add(pod, netns, patience)
        return peer.pid

    async def describe(self, uid: str, details: PodDetails) -> None:
        await self._details.describe(uid, details)

    async def refused(self, uid: str) -> None:
        """Wait until a proxy could not serve the pod, which is enrolled."""
        await self._zds.refused(uid)

    async def offer(self, uid: str, patience: float) -> None:
        """Ask the newest proxy once more to serve the pod."""
        await self._zds.offer(uid, patience)

    async def drain(self, uid: str, timeout: float) -> int | None:  # noqa: ASYNC109  the proxy waits it out
        """Have the pod's connections finished; how many are left, None if that is unknown."""
        return await self._details.drain(uid, timeout)

    async def settle(self, uid: str, timeout: float) -> int | None:  # noqa: ASYNC109  as in drain
        """Wait for the pod's present connections; how many are left, None if that is unknown."""
        return await self._details.settle(uid, timeout)

    async def stop(self, uid: str) -> None:
        """Have every proxy close the pod's listeners."""
        await self._zds.remove(uid)
        self._details.forget(uid)

    async def status(self, uid: str) -> dict[str, Any] | None:
        return await self._details.status(uid)

    async def explain(self, question: Explain) -> dict[str, Any] | None:
        """What the newest proxy would do to a connection; None if none can say."""
        return await self._details.explain(question)

    def __repr__(self) -> str:
        return f"<Proxies {self._zds!r} {self._details!r}>"
