"""What happens to a pod when it is enrolled and when it is freed, in this order and no other.

General theory of operation
---------------------------
Enrolling: look before touching anything (preflight, survey, plan), write the record, PREPARE,
have the proxy bind its listeners, then APPLY (routes), STEER (inbound), GATE (outbound) and mark
the record. Traffic is captured only when everything that serves it is there, and a failure at any
point undoes all of it: an enrolment either is, or leaves nothing.

Un-enrolling: GATE and STEER go first, so that new connections are direct; the proxy finishes the
old ones, which still need the routes; then the listeners and the rest in reverse.

The record is on disk before the first step, and after each stage, so a crash at any point leaves
a file from which any process can undo what was done (`free`, with no agent at all).

The kernel's part is synchronous code that enters the pod's network namespace with a thread; it
runs in trio's worker threads, one at a time, because the loader and the netlink sockets behind it
are not made for more. What has no effect and takes long (`reserve`) goes beside all that. Waiting
for a proxy or for a drain holds up only its own pod.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import trio

from pyambient.errors import PyambientError, UsageError
from pyambient.intercept.interface import Stage
from pyambient.intercept.options import CLOSE
from pyambient.intercept.processes import members
from pyambient.intercept.runner import StepFailed, undo_stages
from pyambient.model.backends import WITH_PROGRAMS
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger

from .config import AgentSettings
from .enrolled import Enrolled, EnrolRequest
from .existing import check_choice, end_existing, end_older_queries, note_existing
from .interception import apply_recorded, give_up_places, make_plan, planned, reserve, write
from .kernel import KernelQueue, beside
from .locate import record_of
from .proxies import Proxies
from .records import Record, RecordStore, State
from .relocation import Relocation
from .switch import Switch
from .upkeep import Upkeep
from .zds_server import NoProxy

_PREPARING: Final = (Stage.PREPARE,)
_DELIVERING: Final = (Stage.APPLY, Stage.STEER)
_STEERING: Final = (Stage.STEER, Stage.GATE)
_FOUNDATION: Final = (Stage.PREPARE, Stage.APPLY)
_ROLLBACK_TIMEOUT: Final = 30.0
_log = get_logger("enrolment")


class Enrolments:
    """All pods of this agent; `hold` is called with each one that is to be followed."""

    def __init__(
        self,
        settings: AgentSettings,
        store: RecordStore,
        proxies: Proxies,
        kernel: KernelQueue,
        hold: Callable[[Enrolled], None],
    ) -> None:
        self.hold = hold
        self.upkeep = Upkeep(settings, store, proxies, kernel)
        self.switch = Switch(settings, store, proxies, kernel)
        self.relocation = Relocation(store, proxies, kernel, self.upkeep.bring_in_line)
        self._settings = settings
        self._store = store
        self._proxies = proxies
        self._kernel = kernel
        self._pods: dict[str, Enrolled] = {}

    def all(self) -> list[Enrolled]:
        """The pods held, sorted by namespace and name."""
        return sorted(self._pods.values(), key=lambda pod: (str(pod.record.pod), pod.uid))

    def lookup(self, netns: str) -> Enrolled:
        """The pod of the network namespace that `netns` means; UsageError if it is not enrolled."""
        record = record_of((pod.record for pod in self._pods.values()), netns)
        return self._pods[record.pod.uid]

    async def enrol(self, request: EnrolRequest) -> Record:
        """Enrol, or leave everything as it was and raise what went wrong.

        What is enrolled already is brought in line with the request: its backend, its choices.
        """
        if (known := self.holder(request.netns)) is not None:
            check_choice(request.existing, known.netns)
            return await self._enrol_again(known, request)
        enrolled = self._claim(request)
        async with enrolled.turn:
            try:
                check_choice(request.existing, enrolled.netns)
                await self._enrol(enrolled)
                if request.existing == CLOSE:
                    await self._kernel.run(end_existing, enrolled)
            except BaseException:
                await self._roll_back(enrolled)
                raise
        _log.info("enrolled", pod=str(enrolled.record.pod), netns=enrolled.record.netns.label)
        self.hold(enrolled)
        return enrolled.record

    def holder(self, netns: str) -> Enrolled | None:
        """The pod that this namespace is enrolled as, or is being enrolled as."""
        with Netns.open(netns) as opened:
            return next((p for p in self._pods.values() if p.netns.key == opened.key), None)

    def _claim(self, request: EnrolRequest) -> Enrolled:
        """Open the namespace; nobody else can enrol it from here on."""
        claimed = Enrolled.opened(request)
        self._pods[claimed.uid] = claimed
        return claimed

    def take(self, record: Record, netns: Netns) -> Enrolled:
        """A pod that a former agent had; it is not followed yet."""
        taken = self._pods[record.pod.uid] = Enrolled(record, netns)
        return taken

    async def _enrol_again(self, enrolled: Enrolled, request: EnrolRequest) -> Record:
        request.refuse_other(enrolled.record)
        async with enrolled.turn:
            self._refuse_leaving(enrolled)
            before = enrolled.record
            options = before.options.changed(request.choices)
            backend = request.backend or before.backend
            plan = await self.switch.plan(enrolled, backend, self.upkeep.site_of(before), options)
            if request.existing == CLOSE:
                await self._kernel.run(end_existing, enrolled)
            if plan.backend == before.backend:
                return await self._change(enrolled, request.choices)
            newest = await self._proxies.newest(self._settings.proxy_timeout)
            self._check_proxy(newest, plan.backend)
            await self.switch.to(enrolled, plan, options)
            await self._end_older_queries(enrolled)
        _log.info("switched", pod=str(before.pod), before=before.backend, now=plan.backend)
        return enrolled.record

    @staticmethod
    def _refuse_leaving(enrolled: Enrolled) -> None:
        record = enrolled.record
        if record.state is not State.ENROLLED or enrolled.freed.is_set():
            raise UsageError(f"{record.netns.label} is {record.state.value}", "enrol it first")

    async def _enrol(self, enrolled: Enrolled) -> None:
        site = self._settings.site
        record = enrolled.record
        plan = await self._kernel.run(
            make_plan, enrolled.target, record.backend, site, record.options
        )
        async with beside(partial(reserve, enrolled.target, plan)):
            self._write(enrolled, planned(record, plan, site))
            await self.relocation.tell(enrolled)
            await self._apply(enrolled, _PREPARING)
            pid = await self._proxies.start(
                enrolled.record.pod, enrolled.netns, enrolled.details, self._settings.proxy_timeout
            )
            self._check_proxy(pid, plan.backend)
            await self._apply(enrolled, _DELIVERING)
        noted = await self._kernel.run(self._set_gate, enrolled)
        self._write(enrolled, noted.changed(state=State.ENROLLED))

    def _set_gate(self, enrolled: Enrolled) -> Record:
        """The record with what the pod has from before the gate."""
        proxy_cgroup = self._settings.site.proxy_cgroup
        gates = [step for step in enrolled.record.steps if step.stage is Stage.GATE]
        apply_recorded(enrolled, gates, self._store)
        end_older_queries(enrolled, proxy_cgroup)
        return note_existing(enrolled, proxy_cgroup)

    async def _end_older_queries(self, enrolled: Enrolled) -> None:
        proxy_cgroup = self.upkeep.site_of(enrolled.record).proxy_cgroup
        await self._kernel.run(end_older_queries, enrolled, proxy_cgroup)

    async def _apply(self, enrolled: Enrolled, stages: tuple[Stage, ...]) -> None:
        chosen = [step for step in enrolled.record.steps if step.stage in stages]
        await self._kernel.run(apply_recorded, enrolled, chosen, self._store)

    def _check_proxy(self, pid: int, backend: str) -> None:
        """The BPF programs know the proxy's sockets by the cgroup they were made in."""
        cgroup = self._settings.site.proxy_cgroup
        if backend in WITH_PROGRAMS and cgroup is not None and pid not in members(cgroup):
            raise PyambientError(
                f"the proxy (pid {pid}) is not in its cgroup {cgroup}",
                "start it with 'pyambient proxy' and the same --cgroup as the agent",
            )

    async def _roll_back(self, enrolled: Enrolled) -> None:
        """Undo what was done, whoever is in a hurry; what takes too long is left to `resume`."""
        # Also where nothing can be written now: it is not to be taken for an enrolled pod.
        enrolled.record = enrolled.record.changed(state=State.DRAINING)
        reason = f"it took longer than {_ROLLBACK_TIMEOUT:g} s"
        deadline = trio.current_time() + _ROLLBACK_TIMEOUT
        with trio.CancelScope(shield=True, deadline=deadline):
            try:
                await trio.to_thread.run_sync(give_up_places, enrolled)
                await self._free(enrolled, drain_timeout=0)
            except (PyambientError, OSError) as error:
                reason = str(error)
        if not enrolled.freed.is_set():
            _log.error("could not undo everything", pod=str(enrolled.record.pod), error=reason)
            self.hold(enrolled)

    async def unenrol(self, enrolled: Enrolled, drain_timeout: float | None = None) -> int | None:
        """Free the pod; how many connections had to be cut, None if nobody could tell."""
        timeout = self._settings.drain_timeout if drain_timeout is None else drain_timeout
        async with enrolled.turn:
            if enrolled.freed.is_set():
                raise UsageError(f"{enrolled.record.netns.label} is not enrolled any more")
            left = await self._free(enrolled, timeout)
        _log.info("unenrolled", pod=str(enrolled.record.pod), connections_cut=left or 0)
        return left

    async def _free(self, enrolled: Enrolled, drain_timeout: float) -> int | None:
        uid, left = enrolled.uid, None
        record = enrolled.record
        if record.steps:
            steps = (*record.leaving, *record.steps)
            self._write(enrolled, record.changed(state=State.DRAINING, steps=steps, leaving=()))
            await self._undo(enrolled, _STEERING)
            left = await self._proxies.drain(uid, drain_timeout)
            await self._proxies.stop(uid)
            await self._undo(enrolled, _FOUNDATION)
        self._let_go(enrolled)
        return left

    async def _undo(self, enrolled: Enrolled, stages: tuple[Stage, ...]) -> None:
        steps = enrolled.record.steps
        try:
            await self._kernel.run(undo_stages, enrolled.target, steps, stages)
        except StepFailed as failure:
            self._write(enrolled, enrolled.record.changed(steps=failure.steps))
            raise
        left = tuple(step for step in steps if step.stage not in stages)
        self._write(enrolled, enrolled.record.changed(steps=left))

    def _let_go(self, enrolled: Enrolled) -> None:
        self._store.remove(enrolled.uid)
        del self._pods[enrolled.uid]
        enrolled.freed.set()
        enrolled.netns.close()

    async def resume(self, enrolled: Enrolled) -> None:
        """Go on with what was not finished: an un-enrolment, or the roll-back of an enrolment."""
        if enrolled.record.state is not State.ENROLLED:
            with contextlib.suppress(NoProxy):
                await self._proxies.newest(self._settings.proxy_timeout)
            await self.unenrol(enrolled)

    async def change(self, enrolled: Enrolled, choices: Mapping[str, Any]) -> Record:
        """Make other choices for the pod, as `CaptureOptions.changed` takes them.

        Connections that live go on as they began. When it fails the former choices hold.
        """
        async with enrolled.turn:
            self._refuse_leaving(enrolled)
            return await self._change(enrolled, choices)

    async def _change(self, enrolled: Enrolled, choices: Mapping[str, Any]) -> Record:
        before = enrolled.record
        options = before.options.changed(choices)
        self._write(enrolled, before.changed(options=options))
        try:
            await self._choose_anew(enrolled, options.dns, before.options.dns)
        except (PyambientError, OSError):
            self._write(enrolled, enrolled.record.changed(options=before.options))
            with contextlib.suppress(PyambientError, OSError):
                await self._choose_anew(enrolled, before.options.dns, options.dns)
            raise
        _log.info("changed", pod=str(before.pod), choices=" ".join(choices))
        return enrolled.record

    async def _choose_anew(self, enrolled: Enrolled, dns: bool, had_dns: bool) -> None:  # noqa: FBT001 - two of one kind
        """Refresh; the proxy listens for DNS before it is captured, and for as long as it is."""
        if dns and not had_dns:
            await self._proxies.describe(enrolled.uid, enrolled.details)
        await self.upkeep.bring_in_line(enrolled)
        if dns and not had_dns:
            await self._end_older_queries(enrolled)
        if had_dns and not dns:
            await self._proxies.describe(enrolled.uid, enrolled.details)

    def _write(self, enrolled: Enrolled, record: Record) -> None:
        write(enrolled, record, self._store)

    def __repr__(self) -> str:
        return f"<Enrolments {len(self._pods)} pods>"
