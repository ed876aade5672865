"""Following what the pods' programs decide, under the pods' names.

This is done by the command itself, not by the agent: the maps are pinned, and root may read them.
So it works without an agent, and no reader is a burden to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import trio

from pyambient.errors import PyambientError, UsageError
from pyambient.intercept.bpf_steps import OwnAddress
from pyambient.intercept.trace_event import Event
from pyambient.intercept.trace_reader import TraceReader
from pyambient.model.backends import WITH_PROGRAMS

from .config import RunDir
from .locate import record_of
from .records import Record, RecordStore
from .traced import Traced

_BEAT: Final = 1.0
_MOST_AT_ONCE: Final = 1000
# A command that runs for days meets many pods that are gone by now.
MOST_NAMES: Final = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """What to show next.

    After the events, so many were lost, as the reader was too slow; and for so many seconds
    nothing was traced, as this process did not run.
    """

    events: tuple[Traced, ...]
    lost: int
    paused: float


class PodNames:
    """Which pod a namespace's cookie stands for, as the records say."""

    def __init__(self, run_dir: RunDir) -> None:
        self._store = RecordStore(run_dir.pods)
        self._read: dict[str, tuple[int, Record]] = {}
        self._by_cookie: dict[int, tuple[str, str]] = {}
        self._changed = -1
        self.refresh()

    @property
    def records(self) -> list[Record]:
        return [record for _, record in self._read.values()]

    def refresh(self) -> None:
        """Read the records that are not as they were."""
        changed = _changed(self._store.directory)
        if changed == self._changed:
            return
        self._changed = changed
        found = {path.stem: _changed(path) for path in self._store.directory.glob("*.json")}
        self._read = {uid: self._read[uid] for uid in self._read.keys() & found}
        for uid, when in found.items():
            if uid not in self._read or self._read[uid][0] != when:
                self._read_one(uid, when)
        for record in self.records:
            place = place_of(record)
            if place is not None:
                self._name(place[1], (record.netns.label, str(record.pod)))

    def _name(self, cookie: int, names: tuple[str, str]) -> None:
        """Whoever was named last comes last, and the first one goes when there are too many."""
        self._by_cookie.pop(cookie, None)
        self._by_cookie[cookie] = names
        if len(self._by_cookie) > MOST_NAMES:
            del self._by_cookie[next(iter(self._by_cookie))]

    def _read_one(self, uid: str, when: int) -> None:
        """A record that is gone, or that cannot be read, names nobody."""
        try:
            self._read[uid] = (when, self._store.read(uid))
        except PyambientError:
            self._read.pop(uid, None)

    def of(self, cookie: int) -> tuple[str, str]:
        """The namespace and the pod, as `status` shows them; also of one that has been freed."""
        return self._by_cookie.get(cookie, (f"cookie:{cookie}", f"cookie:{cookie}"))


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return -1


def place_of(record: Record) -> tuple[Path, int] | None:
    """Where the maps of its programs are, and the cookie it has there; None without programs."""
    if record.backend in WITH_PROGRAMS:
        for step in record.steps:
            if isinstance(step, OwnAddress):
                return (Path(step.bpffs), step.cookie)
    return None


class Trace:
    """Follows the events of one pod, or of all, until it is cancelled."""

    def __init__(self, run_dir: RunDir, netns: str | None, show: Callable[[Batch], None]) -> None:
        """`show` is called in a thread, a batch at a time. UsageError for who cannot be traced."""
        self._names = PodNames(run_dir)
        self._cookie = self._cookie_of(netns) if netns is not None else 0
        self._show = show
        self._reader: TraceReader | None = None
        self._paused = 0.0

    def _cookie_of(self, netns: str) -> int:
        record = record_of(self._names.records, netns)
        place = place_of(record)
        if place is None:
            raise UsageError(
                f"{netns} has backend {record.backend}, whose rules do not tell what they decide",
                "ask 'pyambient explain', or enrol it with --backend bpf or tc",
            )
        return place[1]

    def untraced(self) -> list[str]:
        """The pods whose backend tells nothing."""
        return [str(r.pod) for r in self._names.records if r.backend not in WITH_PROGRAMS]

    def attach(self) -> bool:
        """Begin, unless no pod is there that has programs; PyambientError if too many read.

        All pods of a run directory have their programs in one place.
        """
        place = next(filter(None, map(place_of, self._names.records)), None)
        if place is not None:
            self._reader = TraceReader.open(place[0], self._cookie)
        return self._reader is not None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._live)
            while True:
                await self._follow()

    async def _live(self) -> None:
        """Show that we do, also while somebody lets what we write wait."""
        while True:
            if self._reader is not None:
                self._paused += self._reader.prolong()
            await trio.sleep(_BEAT)

    async def _follow(self) -> None:
        """Until the last pod is freed, which takes the maps along; then await others."""
        if self._reader is None:
            await trio.sleep(_BEAT)
            self._names.refresh()
            self.attach()
            return
        with self._reader as reader:
            try:
                while reader.is_current():
                    await self._turn(reader)
            finally:
                self._reader = None

    async def _turn(self, reader: TraceReader) -> None:
        with trio.move_on_after(_BEAT):
            await trio.lowlevel.wait_readable(reader.fileno())
        events, lost = reader.read(_MOST_AT_ONCE), reader.newly_lost()
        paused, self._paused = self._paused, 0.0
        if events or lost or paused:
            await trio.to_thread.run_sync(
                self._show_events, events, lost, paused, abandon_on_cancel=True
            )

    def _show_events(self, events: Iterable[Event], lost: int, paused: float) -> None:
        self._names.refresh()
        since_boot = time.time_ns() - time.monotonic_ns()
        traced = tuple(
            Traced(event, _moment(since_boot + event.at), *self._names.of(event.netns))
            for event in events
        )
        self._show(Batch(traced, lost, paused))

    def __repr__(self) -> str:
        return f"<Trace of {self._cookie or 'all'} by {os.getpid()}>"


def _moment(nanoseconds: int) -> datetime:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC)
