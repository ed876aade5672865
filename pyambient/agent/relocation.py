"""The proxy's ports in a pod where somebody else has one of them: before it came, or meanwhile.

Before an enrolment others are chosen for what is taken (`intercept.ports`), and said in the log.

While a proxy is away, an app may take a port that the proxy had: the hook on bind() keeps apps from
that with `bpf`, nothing does with the other backends. The next proxy says that it cannot serve the
pod, and ports are chosen anew. What was captured meanwhile was refused with `tc`, as sk_lookup and
the redirects know the proxy's sockets; with the netfilter backends it reached that app.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from pyambient.intercept.holders import holders
from pyambient.intercept.ports import choose_ports
from pyambient.model.ports import WELL_KNOWN, Ports
from pyambient.observe.logs import get_logger

from .enrolled import Enrolled
from .interception import write
from .kernel import KernelQueue
from .proxies import Proxies
from .records import RecordStore, State
from .retry import until_done

# Somebody who takes each port anew must not keep the agent busy.
_PAUSE: Final = 1.0
_PATIENCE: Final = 5.0
_log = get_logger("ports")


class Relocation:
    """Has pods served on ports that are free; `refresh` brings a pod in line with its record."""

    def __init__(
        self,
        store: RecordStore,
        proxies: Proxies,
        kernel: KernelQueue,
        refresh: Callable[[Enrolled], Awaitable[object]],
    ) -> None:
        self._store = store
        self._proxies = proxies
        self._kernel = kernel
        self._refresh = refresh

    async def tell(self, enrolled: Enrolled, before: Ports = WELL_KNOWN) -> None:
        """Log which ports are others than before, and because of whom."""
        pod = str(enrolled.record.pod)
        for former, port in zip(before, enrolled.record.ports, strict=True):
            if former != port:
                by = await self._kernel.run(holders, enrolled.netns, former)
                _log.warning("a port is taken", pod=pod, port=former, by=by, instead=port)

    async def follow(self, enrolled: Enrolled) -> None:
        """Whenever a proxy cannot listen in the pod, have it listen where it can; for ever."""

        def say(reason: str) -> None:
            _log.error("a pod is not served", pod=str(enrolled.record.pod), error=reason)

        while True:
            await self._proxies.refused(enrolled.uid)
            before = enrolled.record.ports
            await until_done(partial(self._relocate, enrolled, before), _PAUSE, say)
            await trio.sleep(_PAUSE)

    async def _relocate(self, enrolled: Enrolled, before: Ports) -> None:
        """Have the pod served on other ports than before; from its beginning if it failed."""
        async with enrolled.turn:
            record = enrolled.record
            if record.state is not State.ENROLLED or enrolled.freed.is_set():
                return
            ports = await self._kernel.run(choose_ports, enrolled.netns, record.ports, served=True)
            if ports == before:
                return  # it failed for another reason, and tries again by itself
            write(enrolled, record.changed(ports=ports), self._store)
            enrolled.seen = b""  # what is in place is about the former ports
            await self._proxies.describe(enrolled.uid, enrolled.details)
            await self._refresh(enrolled)
            await self._proxies.offer(enrolled.uid, _PATIENCE)
        await self.tell(enrolled, before)
