"""A network namespace that another one has replaced under its name: the pod, made anew.

The replacement is enrolled as its predecessor was, and only then the predecessor is let go: so an
agent that is killed in between leaves a record by which the next one sees it again. While it cannot
be enrolled (there is no proxy, or something keeps it from it) that is tried again, and the record
of the predecessor stays. One that still has a process in it stays enrolled beside its replacement.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from pyambient.observe.logs import get_logger

from .enrolled import EnrolRequest
from .enrolment import Enrolments
from .locate import is_replaced
from .records import Record, State
from .retry import until_done

_PAUSE: Final = 1.0
_COUNTED_AS: Final = "netns"
_log = get_logger("succession")


class Succession:
    """Enrols what has replaced pods of one agent."""

    def __init__(self, enrolments: Enrolments) -> None:
        self._enrolments = enrolments

    async def follow(self, record: Record) -> None:
        """Return when the replacement is enrolled, or there is none any more."""

        def say(reason: str) -> None:
            _log.error("cannot enrol a replacement", pod=str(record.pod), error=reason)

        await until_done(partial(self._enrol, record), _PAUSE, say)

    async def _enrol(self, record: Record) -> None:
        if record.state is not State.ENROLLED or not is_replaced(record.netns):
            return
        if self._enrolments.holder(record.netns.path) is not None:
            return
        pod = record.pod
        request = EnrolRequest(
            record.netns.path,
            pod.name,
            pod.namespace,
            pod.service_account,
            record.backend,
            choices=record.options.to_json(),
        )
        await self._enrolments.enrol(request)
        self._enrolments.lookup(record.netns.path).repairs[_COUNTED_AS] += 1
        _log.warning("enrolled a replacement", pod=str(pod), netns=record.netns.label)

    def __repr__(self) -> str:
        return f"<Succession in {self._enrolments!r}>"
