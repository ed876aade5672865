"""The round: every few seconds each enrolled pod is looked at, and what got lost is put back.

General theory of operation
---------------------------
Most of what changes in a pod is told by the kernel at once (`watcher`). Not all of it: nobody tells
of an unpinned program, of an entry that left a map or of a changed sysctl, and messages get lost.
So every pod is looked at every five seconds as well. A look at a pod that nobody touched takes
around a millisecond (`interception.has_drifted`); only one that was touched is planned and verified
anew. The pods come one after the other, each with its own turn in the queue for the kernel's part
of the work, so that an enrolment that comes meanwhile waits for one look and not for 500.

What goes wrong with a pod is logged once for each new reason, and tried again in the next round.
"""

from __future__ import annotations

from typing import Any

import trio

from pyambient.errors import PyambientError
from pyambient.observe.logs import get_logger

from .enrolled import Enrolled
from .enrolment import Enrolments
from .interception import Round

_log = get_logger("reconcile")


class Rounds:
    """Goes round the pods, for ever; `rounds` and `seconds` (of the last one) are for people."""

    def __init__(self, enrolments: Enrolments, pause: float) -> None:
        """`pause` is between two rounds, in seconds."""
        self.rounds = 0
        self.seconds = 0.0
        self._enrolments = enrolments
        self._upkeep = enrolments.upkeep
        self._pause = pause
        self._failures: dict[str, str] = {}

    async def run(self) -> None:
        while True:
            await trio.sleep(self._pause)
            await self._round()

    async def _round(self) -> None:
        started = trio.current_time()
        this = Round()
        pods = self._enrolments.all()
        for enrolled in pods:
            await self._look_at(enrolled, this)
        self._failures = {p.uid: self._failures[p.uid] for p in pods if p.uid in self._failures}
        await self._clear_dead_traces()
        self.rounds += 1
        self.seconds = trio.current_time() - started

    async def _look_at(self, enrolled: Enrolled, this: Round) -> None:
        try:
            await self._upkeep.inspect(enrolled, this)
            await self._upkeep.look_for_leaks(enrolled)
        except (PyambientError, OSError) as error:
            self._note(enrolled, str(error), None)
        except Exception as error:  # noqa: BLE001 - a bug met by one pod spares the others
            self._note(enrolled, f"internal error: {error!r}", error)
        else:
            self._failures.pop(enrolled.uid, None)

    async def _clear_dead_traces(self) -> None:
        try:
            await self._upkeep.clear_dead_traces()
        except OSError as error:
            _log.error("cannot clear up after a trace", error=str(error))

    def _note(self, enrolled: Enrolled, reason: str, bug: Exception | None) -> None:
        """Log a failure, unless it is the one of the round before."""
        if self._failures.get(enrolled.uid) != reason:
            pod = str(enrolled.record.pod)
            _log.error("cannot repair a pod", pod=pod, error=reason, exc_info=bug)
        self._failures[enrolled.uid] = reason

    def status(self) -> dict[str, Any]:
        """What to show, as JSON values."""
        return {
            "rounds": self.rounds,
            "seconds": round(self.seconds, 4),
            "failing": len(self._failures),
        }

    def __repr__(self) -> str:
        return f"<Rounds {self.rounds} so far, the last in {self.seconds:.3f} s>"
