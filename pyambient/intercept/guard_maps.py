"""What the guards of one pod share and tell: maps pinned in the pod's directory of bpffs.

`existing` holds the sockets from before the enrolment, `let_in` those that a selection let come in
and that have not spoken yet, the others what was dropped. They go with the directory, when the pod
is freed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyambient.model.address import SocketAddress, canonical_ip

from .existing import existing_connections
from .interface import Pod
from .kernel_objects import Map, MapType
from .loader import LoadedObject
from .node_pins import pod_directory

EXISTING: Final = "existing"
COUNTS: Final = "drop_counts"
LET_IN: Final = "let_in"
LAST: Final = "last_drops"
# In the order of their numbers in bpf/drops.h.
REASONS: Final = ("captured", "socket", "raw", "forwarded", "unreadable", "unsigned", "dns")
_LAST_DROPS: Final = 16
_KEY: Final = struct.Struct("=I")
_COOKIE: Final = struct.Struct("=Q")
# struct drop of bpf/drops.h.
_DROP: Final = struct.Struct("=8x16s16sIIQII")


@dataclass(frozen=True, slots=True)
class Drop:
    """Packets of one connection that a guard dropped; `at` is CLOCK_MONOTONIC in seconds.

    Ports are 0 where none could be read.
    """

    reason: str
    source: SocketAddress
    destination: SocketAddress
    count: int
    at: float

    def to_json(self) -> dict[str, Any]:
        return {
            "reason": self.reason,
            "source": str(self.source),
            "destination": str(self.destination),
            "count": self.count,
            "seconds_ago": round(time.monotonic() - self.at, 3),
        }

    def __str__(self) -> str:
        return f"{self.reason} {self.source} > {self.destination} ({self.count})"


@dataclass(frozen=True, slots=True)
class Drops:
    """What the guards of a pod dropped, or would have: packets by reason, and the last of them."""

    counts: Mapping[str, int]
    last: tuple[Drop, ...]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_json(self) -> dict[str, Any]:
        counts = {reason: count for reason, count in self.counts.items() if count}
        return {"dropped": counts, "last": [drop.to_json() for drop in self.last]}


@contextlib.contextmanager
def opened(pod: Pod, bpffs: Path, *names: str) -> Iterator[dict[str, Map]]:
    """Those of the pod's maps that are there."""
    directory = pod_directory(bpffs, pod.uid)
    with contextlib.ExitStack() as stack:
        found = [Map.open_pinned(directory / name) for name in names]
        yield {m.name: stack.enter_context(m) for m in found if m is not None}


def keep_new(pod: Pod, bpffs: Path, loaded: LoadedObject, known: Mapping[str, Map]) -> None:
    """Pin the maps that the object had to make itself."""
    for name, fresh in loaded.maps().items():
        with fresh:
            if name not in known:
                fresh.pin(pod_directory(bpffs, pod.uid) / name)


def note_existing(pod: Pod, bpffs: Path, *, look: bool) -> None:
    """Have `existing` pinned; unless it is, with what the pod has now if `look`, or empty.

    Who had it and lost it must not look again: what is there by now may have passed a guard that
    was gone.
    """
    pin = pod_directory(bpffs, pod.uid) / EXISTING
    if pin.exists():
        return
    connections = existing_connections(pod.netns) if look else ()
    size = max(1, len(connections))
    with Map.create(MapType.HASH, EXISTING, (_COOKIE.size, 1), size, 0) as existing:
        for connection in connections:
            existing.put(_COOKIE.pack(connection.cookie), b"\1")
        existing.pin(pin)


def read_drops(bpffs: Path, uid: str) -> Drops | None:
    """What was dropped of a pod since its enrolment; None where nothing guards it."""
    directory = pod_directory(bpffs, uid)
    counts, last = Map.open_pinned(directory / COUNTS), Map.open_pinned(directory / LAST)
    with contextlib.ExitStack() as stack:
        if counts is None or last is None:
            return None
        stack.enter_context(counts)
        stack.enter_context(last)
        numbers = {r: _total(counts, number) for number, r in enumerate(REASONS)}
        places = [last.get(_KEY.pack(place)) for place in range(_LAST_DROPS)]
    drops = [drop for raw in places if raw and (drop := _read(raw)).count]
    return Drops(numbers, tuple(sorted(drops, key=lambda drop: drop.at)))


def _total(counts: Map, number: int) -> int:
    values = counts.get_of_each_cpu(_KEY.pack(number))
    return sum(int.from_bytes(value, "little") for value in values)


def _read(raw: bytes) -> Drop:
    source, destination, from_port, to_port, nanoseconds, reason, count = _DROP.unpack(raw)
    return Drop(
        REASONS[reason],
        SocketAddress(_ip(source), from_port),
        SocketAddress(_ip(destination), to_port),
        count,
        nanoseconds / 1e9,
    )


def _ip(raw: bytes) -> str:
    return canonical_ip(socket.inet_ntop(socket.AF_INET6, raw))
