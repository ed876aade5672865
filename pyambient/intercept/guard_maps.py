"""What the guards of one pod share and tell: the pod's places in maps of the node.

`existing` holds the sockets from before the enrolment, in a map for each pod that has any; `drops`
what was dropped, and how much.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyambient.model.address import SocketAddress, canonical_ip

from .kernel_objects import Map, MapType
from .node_pins import existing_map, node_map
from .socket_diag import Socket

EXISTING: Final = "existing"
DROPS: Final = "drops"
# In the order of their numbers in bpf/drops.h.
REASONS: Final = ("captured", "socket", "raw", "forwarded", "unreadable", "unsigned", "dns")
_FD: Final = struct.Struct("=I")
_COOKIE: Final = struct.Struct("=Q")
_INNER: Final = (_COOKIE.size, 1)  # of the maps in `existing` (bpf/guard.bpf.c)
# struct drops and struct drop of bpf/drops.h.
_COUNTS: Final = struct.Struct(f"={len(REASONS)}Q")
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


def note_older(bpffs: Path | str, cookie: int, connections: Collection[Socket]) -> None:
    """Note a pod's connections from before its enrolment; what is there stays.

    Only where there are any: when a map in a map changes, the kernel waits until no CPU can still
    be at what was there before, which takes it milliseconds.
    """
    with existing_map(bpffs, EXISTING) as existing, _filled(connections) as older:
        existing.add(_COOKIE.pack(cookie), _FD.pack(older.fd))


def _filled(connections: Collection[Socket]) -> Map:
    older = Map.create(MapType.HASH, EXISTING, _INNER, len(connections), 0)
    try:
        for connection in connections:
            older.put(_COOKIE.pack(connection.cookie), b"\1")
    except BaseException:
        older.close()
        raise
    return older


def count_drops(bpffs: Path | str, cookie: int) -> None:
    """Have a place for what is dropped of a pod, which keeps what it has."""
    with existing_map(bpffs, DROPS) as drops:
        drops.add(_COOKIE.pack(cookie), bytes(drops.value_size))


def forget(bpffs: Path | str, cookie: int) -> None:
    """Give up the pod's places; only where there are any, for the reason above."""
    for name in (EXISTING, DROPS):
        if has_place(bpffs, name, cookie):
            with existing_map(bpffs, name) as found:
                found.delete(_COOKIE.pack(cookie))


def has_place(bpffs: Path | str, name: str, cookie: int) -> bool:
    return _get(bpffs, name, cookie) is not None


def _get(bpffs: Path | str, name: str, cookie: int) -> bytes | None:
    found = node_map(bpffs, name)
    if found is None:
        return None
    with found:
        return found.get(_COOKIE.pack(cookie))


def read_drops(bpffs: Path | str, cookie: int) -> Drops | None:
    """What was dropped of a pod since its enrolment; None where nothing guards it."""
    raw = _get(bpffs, DROPS, cookie)
    if raw is None:
        return None
    counts = dict(zip(REASONS, _COUNTS.unpack_from(raw), strict=True))
    places = _DROP.iter_unpack(raw[_COUNTS.size :])
    drops = [drop for place in places if (drop := _read(place)).count]
    return Drops(counts, tuple(sorted(drops, key=lambda drop: drop.at)))


def _read(place: tuple[Any, ...]) -> Drop:
    source, destination, from_port, to_port, nanoseconds, reason, count = place
    return Drop(
        REASONS[reason],
        SocketAddress(_ip(source), from_port),
        SocketAddress(_ip(destination), to_port),
        count,
        nanoseconds / 1e9,
    )


def _ip(raw: bytes) -> str:
    return canonical_ip(socket.inet_ntop(socket.AF_INET6, raw))
