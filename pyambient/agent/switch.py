"""Another backend for a pod that lives, with no moment at which a new connection goes uncaptured.

General theory of operation
---------------------------
What the next backend adds is applied beside what is there, its gate last; only then the gate and
the steering of the one before are undone. In between both see the pod's new connections, and
whichever comes first they reach the same proxy: a socket that `bpf` marked is one that netfilter's
rules accept, and what they redirect sk_lookup takes to the same listener.

`bpf` and `tc` have one gate, an entry that says which of them captures: it is exchanged at one
moment, and what else they share stays (`Replacing`). Neither must undo what the other goes on with.

Where a connection wanted to go conntrack knows, or the socket itself. While a netfilter backend is
there the proxy asks conntrack first, which knows connections of the others as what they are. So the
proxy is told of a netfilter backend before it captures, and of another one when it alone captures.

Connections from before go on: none is closed. What they need (routes, guards, base chains) stays,
in the record under `leaving`, until those that the proxy relays have ended or their time is up.
If it fails, all is as before; if the agent dies, its successor makes whole the one of the two that
the record names, and then takes the other away.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

import trio

from pyambient.errors import PyambientError
from pyambient.intercept.choose import choose
from pyambient.intercept.interface import Plan, Replacing, Site, Stage, Step
from pyambient.intercept.options import CaptureOptions
from pyambient.intercept.preflight import preflight
from pyambient.intercept.runner import StepFailed, lost, undo_stages
from pyambient.model.backends import NETFILTER
from pyambient.observe.logs import get_logger

from .config import AgentSettings
from .enrolled import Enrolled
from .interception import addresses_of, apply_recorded, network_of, observed, write
from .kernel import KernelQueue
from .proxies import Proxies
from .records import Record, RecordStore
from .retry import until_done

_FOUNDATION: Final = (Stage.PREPARE, Stage.APPLY)
_STEERING: Final = (Stage.STEER, Stage.GATE)
_log = get_logger("switch")


class Switch:
    """Changes backends; whoever calls has the pod's turn, but for `follow`."""

    def __init__(
        self, settings: AgentSettings, store: RecordStore, proxies: Proxies, kernel: KernelQueue
    ) -> None:
        self._settings = settings
        self._store = store
        self._proxies = proxies
        self._kernel = kernel

    async def plan(
        self, enrolled: Enrolled, backend: str, site: Site, options: CaptureOptions
    ) -> Plan:
        """What the backend would have in the pod; PyambientError if it cannot be there."""
        return await self._kernel.run(_plan, enrolled, backend, site, options)

    async def to(self, enrolled: Enrolled, plan: Plan, options: CaptureOptions) -> None:
        """Have the plan in the place of what the record says."""
        try:
            await self._to(enrolled, plan, options)
        finally:
            enrolled.switched.set()

    async def _to(self, enrolled: Enrolled, plan: Plan, options: CaptureOptions) -> None:
        before = enrolled.record
        present = (*before.leaving, *before.steps)
        added = await self._kernel.run(_begin, enrolled, plan, present, self._store)
        try:
            await self._add(enrolled, added, _FOUNDATION)
            if plan.backend in NETFILTER:
                write(enrolled, enrolled.record.changed(backend=plan.backend), self._store)
                await self._proxies.describe(enrolled.uid, enrolled.details)
            await self._add(enrolled, added, _STEERING)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._kernel.run(_take_back, enrolled, before, added, self._store)
                await self._proxies.describe(enrolled.uid, enrolled.details)
            raise
        await self._kernel.run(_withdraw, enrolled, plan, options, present, self._store)
        await self._proxies.describe(enrolled.uid, enrolled.details)

    async def _add(self, enrolled: Enrolled, added: list[Step], stages: tuple[Stage, ...]) -> None:
        chosen = [step for step in added if step.stage in stages]
        await self._kernel.run(apply_recorded, enrolled, chosen, self._store)

    async def follow(self, enrolled: Enrolled) -> None:
        """After each change of the backend, take away what its connections needed; for ever."""
        pod = str(enrolled.record.pod)

        def say(reason: str) -> None:
            _log.error("cannot take a former backend away", pod=pod, error=reason)

        while True:
            enrolled.switched = trio.Event()
            await until_done(partial(self._tidy, enrolled), self._settings.round_pause, say)
            await enrolled.switched.wait()

    async def _tidy(self, enrolled: Enrolled) -> None:
        """Undo what another backend left; nothing if yet another one has come meanwhile."""
        if not enrolled.record.leaving:
            return
        await self._settle(enrolled)
        async with enrolled.turn:
            if not enrolled.freed.is_set() and not enrolled.switched.is_set():
                await self._kernel.run(_tidy, enrolled, self._store)

    async def _settle(self, enrolled: Enrolled) -> None:
        """Wait until what the proxy relays for the pod now has ended, or its time is up."""
        patience = self._settings.drain_timeout
        if await self._proxies.settle(enrolled.uid, patience) is None:
            await trio.sleep(patience)  # a proxy that cannot be asked


def _plan(enrolled: Enrolled, backend: str, site: Site, options: CaptureOptions) -> Plan:
    interceptor = choose(backend, site, enrolled.netns, options)
    record = enrolled.record
    preflight(enrolled.target, site, interceptor.name, (*record.leaving, *record.steps))
    return interceptor.plan(enrolled.target, network_of(enrolled.target, record.ports), options)


def _begin(
    enrolled: Enrolled, plan: Plan, present: tuple[Step, ...], store: RecordStore
) -> list[Step]:
    """Record what there is and what will be; the latter."""
    pod = enrolled.target
    added = [observed(pod, step) for step in plan.steps if step not in present]
    write(enrolled, enrolled.record.changed(steps=(*present, *added), leaving=()), store)
    return added


def _take_back(enrolled: Enrolled, before: Record, added: list[Step], store: RecordStore) -> None:
    """Apply again what was replaced, and undo what else was added.

    What cannot be undone now is `leaving`. Nothing is raised: what the caller has to tell is why
    there is something to undo at all.
    """
    regained = [s for s in (*before.leaving, *before.steps) if any(_replaces(s, n) for n in added)]
    kept = [new for new in added if any(_replaces(step, new) for step in regained)]
    stuck = tuple(s for s in enrolled.record.steps if s in added and s not in kept)
    try:
        apply_recorded(enrolled, regained, store)
        stuck = _undo(enrolled, stuck)
    except (PyambientError, OSError) as error:
        _log.error("the former backend is not whole", pod=str(before.pod), error=str(error))
    try:
        write(enrolled, before.changed(leaving=(*before.leaving, *stuck)), store)
        _make_whole(enrolled, store)
    except (PyambientError, OSError) as error:
        _log.error("the former backend is not whole", pod=str(before.pod), error=str(error))


def _undo(enrolled: Enrolled, steps: Iterable[Step]) -> tuple[Step, ...]:
    """Undo these; those that could not be undone, which the log tells."""
    try:
        undo_stages(enrolled.target, steps)
    except StepFailed as failure:
        _log.error("not all of a backend goes", pod=str(enrolled.record.pod), error=str(failure))
        return failure.steps
    return ()


def _make_whole(enrolled: Enrolled, store: RecordStore) -> None:
    """Apply again what got lost of the backend that the record names."""
    gone = [step for step, _ in lost(enrolled.target, enrolled.record.steps)]
    apply_recorded(enrolled, gone, store)


def _withdraw(
    enrolled: Enrolled,
    plan: Plan,
    options: CaptureOptions,
    present: tuple[Step, ...],
    store: RecordStore,
) -> None:
    """Stop the former capture; what its connections need goes on under `leaving`."""
    left = [s for s in present if s not in plan.steps and not _is_replaced(s, plan)]
    stuck = _undo(enrolled, [step for step in left if step.stage in _STEERING])
    known = {step: step for step in enrolled.record.steps}
    changed = enrolled.record.changed(
        backend=plan.backend,
        options=options,
        steps=tuple(known[step] for step in plan.steps),
        addresses=addresses_of(plan),
        leaving=(*(known[step] for step in left if step.stage in _FOUNDATION), *stuck),
    )
    write(enrolled, changed, store)
    enrolled.seen = b""


def _is_replaced(step: Step, plan: Plan) -> bool:
    return any(_replaces(new, step) for new in plan.steps)


def _replaces(step: Step, earlier: Step) -> bool:
    return isinstance(step, Replacing) and step.takes_over(earlier)


def _tidy(enrolled: Enrolled, store: RecordStore) -> None:
    """What captures now has to be whole before what captured before can go."""
    _make_whole(enrolled, store)
    try:
        undo_stages(enrolled.target, enrolled.record.leaving)
    except StepFailed as failure:
        write(enrolled, enrolled.record.changed(leaving=failure.steps), store)
        raise
    write(enrolled, enrolled.record.changed(leaving=()), store)
