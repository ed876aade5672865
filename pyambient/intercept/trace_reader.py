"""Reading what the BPF programs decide, while they decide it.

General theory of operation
---------------------------
Two maps of the node are all that programs and readers share: an array of places, which says who
reads and what, and next to it a ring buffer for each place, which its reader brings. What the
programs find no room for in a ring is lost, and counted in the place.

A place is a lease: the programs write to a ring no longer than its reader has promised to live. A
reader prolongs it every second. One that was killed costs the programs nothing more than a look at
the clock from then on, until somebody clears its place: the agent does so in each of its rounds.

Places are words in memory that this process shares with the programs, so that one reader's writing
undoes nothing of another's.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Final, Self

from pyambient.errors import PyambientError

from .kernel_objects import Map
from .node_pins import node_map
from .ring_buffer import RingBuffer
from .trace_event import Event

# READERS and RING_BYTES of bpf/trace.h.
READERS: Final = 4
RING_BYTES: Final = 1 << 20
LEASE: Final = 10_000_000_000  # ns
PLACES_MAP: Final = "trace_readers"
RINGS_MAP: Final = "trace_rings"
_ONLY: Final = bytes(4)
_ALL_BITS: Final = (1 << 64) - 1


class _Place(ctypes.Structure):
    """struct reader of bpf/trace.h."""

    _fields_: ClassVar = [
        *((name, ctypes.c_uint64) for name in ("until", "netns", "mask", "lost", "ring")),
        ("padding", ctypes.c_uint64 * 3),
    ]

    until: int
    netns: int
    mask: int
    lost: int
    ring: int


_Places = _Place * READERS


class _Shared:
    """The two maps, and the places as memory; close it, or use it as a context manager."""

    def __init__(self, bpffs: Path, places: Map, rings: Map) -> None:
        """Take over both maps."""
        self.identifier = places.identifier
        self._node = bpffs / "node"
        self._maps = (places, rings)
        self._rings = rings
        # The memory goes with the last reference to a place.
        self.places: list[_Place] = list(_Places.from_buffer(mmap.mmap(places.fd, mmap.PAGESIZE)))

    @classmethod
    def open(cls, bpffs: Path) -> Self | None:
        """None where no pod is enrolled."""
        places, rings = node_map(bpffs, PLACES_MAP), node_map(bpffs, RINGS_MAP)
        if places is not None and rings is not None:
            return cls(bpffs, places, rings)
        for found in filter(None, (places, rings)):
            found.close()
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """For who takes, or gives back, a place: one at a time."""
        fd = os.open(self._node, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def take(self, number: int, ring: Map, netns: int) -> None:
        """The lease comes last: it is what the programs look at first."""
        place = self.places[number]
        place.netns, place.mask = netns, _ALL_BITS if netns else 0
        place.lost, place.ring = 0, ring.identifier
        self._rings.put(_key(number), struct.pack("=I", ring.fd))
        place.until = time.monotonic_ns() + LEASE

    def clear(self, number: int) -> None:
        place = self.places[number]
        place.until = place.ring = 0
        self._rings.delete(_key(number))

    def close(self) -> None:
        self.places.clear()
        for held in self._maps:
            held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TraceReader:
    """One reader of events; close it, or use it as a context manager."""

    def __init__(self, bpffs: Path, shared: _Shared, netns: int = 0) -> None:
        """Take a place; PyambientError if all are taken. `netns` is a cookie, or 0 for all."""
        self._bpffs = bpffs
        self._shared = shared
        self._ring = RingBuffer("trace_ring", RING_BYTES)
        self._lost = 0
        try:
            self._number = self._take_place(netns)
        except BaseException:
            self._ring.close()
            raise

    @classmethod
    def open(cls, bpffs: Path, netns: int = 0) -> Self | None:
        """None where no pod is enrolled with a backend that has programs."""
        shared = _Shared.open(bpffs)
        if shared is None:
            return None
        try:
            return cls(bpffs, shared, netns)
        except BaseException:
            shared.close()
            raise

    def _take_place(self, netns: int) -> int:
        with self._shared.locked():
            now = time.monotonic_ns()
            for number, place in enumerate(self._shared.places):
                if place.until <= now:
                    self._shared.take(number, self._ring.map, netns)
                    return number
        raise PyambientError(f"{READERS} others trace already", "end one of them")

    def fileno(self) -> int:
        """Readable while there are events."""
        return self._ring.fileno()

    def prolong(self) -> float:
        """Promise to live on; for how many seconds the programs had taken this reader for dead."""
        now = time.monotonic_ns()
        if not self._has_place:
            return 0.0
        late = now - self._place.until
        self._place.until = now + LEASE
        return max(late, 0) / 1e9

    def is_current(self) -> bool:
        """Whether the programs of the node still use these maps, and the place is still ours."""
        pinned = node_map(self._bpffs, PLACES_MAP)
        if pinned is None:
            return False
        with pinned:
            return pinned.identifier == self._shared.identifier and self._has_place

    def read(self, most: int) -> list[Event]:
        """What has been decided, oldest first, and no more than `most` of it."""
        return [Event.unpack(raw) for raw in self._ring.read(most)]

    def newly_lost(self) -> int:
        """How many events were lost since it was last asked."""
        if not self._has_place:
            return 0
        before, self._lost = self._lost, self._place.lost
        return self._lost - before

    @property
    def _place(self) -> _Place:
        return self._shared.places[self._number]

    @property
    def _has_place(self) -> bool:
        """Not any more, where this process slept and another took it for dead."""
        return bool(self._place.ring == self._ring.map.identifier)

    def close(self) -> None:
        """Give the place back."""
        with contextlib.suppress(FileNotFoundError), self._shared.locked():
            if self._has_place:
                self._shared.clear(self._number)
        self._shared.close()
        self._ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<TraceReader {self._number} of {self._bpffs}>"


def clear_dead(bpffs: Path) -> int:
    """Clear the places of readers that were killed, which gives their rings back; how many."""
    places = node_map(bpffs, PLACES_MAP)
    if places is None:
        return 0
    with places:
        if not any(places.get(_ONLY) or b""):
            return 0
    shared = _Shared.open(bpffs)
    if shared is None:
        return 0
    with shared, shared.locked():
        now = time.monotonic_ns()
        dead = [n for n, place in enumerate(shared.places) if 0 < place.until <= now]
        for number in dead:
            shared.clear(number)
    return len(dead)


def _key(number: int) -> bytes:
    return struct.pack("=I", number)
