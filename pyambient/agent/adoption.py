"""What a former agent left: live pods go on, half-done enrolments and dead pods go."""

from __future__ import annotations

from pyambient.errors import PyambientError
from pyambient.observe.logs import get_logger

from .enrolled import Enrolled
from .enrolment import Enrolments
from .interception import free
from .kernel import KernelQueue
from .locate import find, is_replaced
from .proxies import Proxies
from .records import Record, RecordStore, State

_log = get_logger("adoption")


class Adoption:
    """Takes over what the records say.

    `unfinished` are records whose namespace is gone: another one has replaced it, or what is left
    of it could not be undone yet.
    """

    def __init__(
        self, enrolments: Enrolments, store: RecordStore, proxies: Proxies, kernel: KernelQueue
    ) -> None:
        self.unfinished: list[Record] = []
        self._enrolments = enrolments
        self._store = store
        self._proxies = proxies
        self._kernel = kernel

    async def adopt_all(self) -> None:
        """Once, before anybody can ask; what cannot be taken over is in the log."""
        self._store.sweep()
        records, errors = self._store.readable()
        for error in errors:
            _log.error("cannot read a record", error=str(error))
        for record in records:
            try:
                await self._adopt(record)
            except (PyambientError, OSError) as error:
                _log.error("cannot take over a pod", pod=str(record.pod), error=str(error))

    async def _adopt(self, record: Record) -> None:
        netns = find(record.netns)
        if netns is None:
            if record.state is State.ENROLLED and is_replaced(record.netns):
                self.unfinished.append(record)
            else:
                await self._clean_up_or_leave(record)
            return
        enrolled = self._enrolments.take(record, netns)
        if record.state is State.ENROLLING:
            await self._unenrol_or_hold(enrolled)
            return
        await self._proxies.adopt(record.pod, netns, enrolled.details)
        self._enrolments.hold(enrolled)
        _log.info("took over", pod=str(record.pod), netns=record.netns.label)

    async def _clean_up_or_leave(self, record: Record) -> None:
        try:
            await self.clean_up(record)
        except (PyambientError, OSError):
            self.unfinished.append(record)
            raise

    async def _unenrol_or_hold(self, enrolled: Enrolled) -> None:
        try:
            await self._enrolments.unenrol(enrolled, drain_timeout=0)
        except (PyambientError, OSError):
            self._enrolments.hold(enrolled)
            raise

    async def clean_up(self, record: Record) -> None:
        """Undo what is left of a pod that is gone, and forget it."""
        await self._kernel.run(free, record, self._store)
        _log.info("cleaned up after a pod that is gone", pod=str(record.pod))

    def __repr__(self) -> str:
        return f"<Adoption in {self._enrolments!r}>"
