"""An enrolled pod, kept as its record says; and what is to be seen of it meanwhile.

Whatever changes in its network, or gets lost of what was added to it, is put right from here: when
the kernel tells of it (`watcher`), in each round (`reconcile`), or when other choices were made.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Site
from pyambient.intercept.trace_reader import clear_dead
from pyambient.observe.logs import get_logger

from .config import AgentSettings
from .enrolled import Enrolled
from .existing import count_existing
from .interception import Repair, Round, bring_up_to_date, has_drifted
from .kernel import KernelQueue
from .leaks import describe_leaks, look_for_leaks
from .proxies import Proxies
from .records import Record, RecordStore, State

_log = get_logger("upkeep")


class Upkeep:
    """Looks at pods and repairs them; one at a time has a pod's turn."""

    def __init__(
        self, settings: AgentSettings, store: RecordStore, proxies: Proxies, kernel: KernelQueue
    ) -> None:
        self._settings = settings
        self._store = store
        self._proxies = proxies
        self._kernel = kernel

    def site_of(self, record: Record) -> Site:
        """With its own cgroup, not ours of today: its programs are attached there."""
        cgroup = Path(record.cgroup) if record.cgroup else None
        return dataclasses.replace(self._settings.site, cgroup=cgroup)

    async def refresh(self, enrolled: Enrolled) -> None:
        """Bring the pod's interception in line with the addresses and devices it has now."""
        async with enrolled.turn:
            await self._repair(enrolled)

    async def inspect(self, enrolled: Enrolled, round_: Round | None = None) -> None:
        """Refresh the pod if something of it has got lost; alone, or in a round."""
        if enrolled.turn.locked():
            return  # whoever has the turn sees to the pod
        async with enrolled.turn:
            if enrolled.record.state is not State.ENROLLED or enrolled.freed.is_set():
                return
            if await self._kernel.run(has_drifted, enrolled, round_ or Round()):
                await self._repair(enrolled)

    async def _repair(self, enrolled: Enrolled) -> None:
        repairs = await self.bring_in_line(enrolled)
        for repair in repairs:
            pod = str(enrolled.record.pod)
            _log.warning("repaired", pod=pod, what=repair.what, why=repair.why)
        enrolled.repairs.update(repair.kind for repair in repairs)

    async def bring_in_line(self, enrolled: Enrolled) -> list[Repair]:
        """What `refresh` does, for whoever has the pod's turn; what had to be done."""
        before = enrolled.record
        if before.state is not State.ENROLLED or enrolled.freed.is_set():
            return []
        interceptor = await self._kernel.run(choose, before.backend, self.site_of(before))
        repairs = await self._kernel.run(bring_up_to_date, enrolled, interceptor, self._store)
        if enrolled.record.addresses != before.addresses:
            addresses = " ".join(enrolled.record.addresses)
            _log.info("addresses changed", pod=str(before.pod), addresses=addresses)
            await self._proxies.describe(enrolled.uid, enrolled.details)
        return repairs

    async def look_for_leaks(self, enrolled: Enrolled) -> None:
        """Log what got out of the pod past the mesh, or tried to, since the last look."""
        if enrolled.turn.locked():
            return
        async with enrolled.turn:
            if enrolled.record.state is State.ENROLLED and not enrolled.freed.is_set():
                args = (enrolled.record, enrolled.netns, enrolled.leaks)
                await self._kernel.run(look_for_leaks, *args)

    async def leaks(self, enrolled: Enrolled) -> dict[str, Any] | None:
        """What the pod's guards saw, as JSON values; None where it has none."""
        args = (enrolled.record, enrolled.netns, enrolled.leaks)
        return await self._kernel.run(describe_leaks, *args)

    async def existing(self, enrolled: Enrolled) -> int:
        """How many connections from before still live."""
        if not enrolled.record.existing:
            return 0
        return await self._kernel.run(count_existing, enrolled.record, enrolled.netns)

    async def clear_dead_traces(self) -> None:
        """Take back what killed readers of events have left in the kernel."""
        await self._kernel.run(clear_dead, self._settings.bpffs)

    def __repr__(self) -> str:
        return f"<Upkeep in {self._settings.run_dir.path}>"
