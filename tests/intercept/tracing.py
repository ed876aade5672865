"""Reading what is told of pods' decisions, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from pyambient.intercept.bpf_steps import OwnAddress
from pyambient.intercept.trace_event import Event
from pyambient.intercept.trace_reader import TraceReader
from pyambient.model.address import SocketAddress
from tests.bed import Bed

from .bpf_mesh import BPFFS, BpfMesh


class Told(NamedTuple):
    """An event without what differs from run to run, and from backend to backend."""

    pod: str
    decision: str
    direction: str
    destination: SocketAddress
    listener: int = 0
    reason: str = ""


@contextlib.contextmanager
def enrolled(bed: Bed, backend: str) -> Iterator[BpfMesh]:
    """Pods a and b enrolled; pod c of the bed is outside the mesh."""
    mesh = BpfMesh(bed, bed.pod("a"), bed.pod("b"))
    mesh.backend = backend
    bed.pod("c")
    with mesh:
        yield mesh


def open_reader(netns: int = 0) -> TraceReader:
    opened = TraceReader.open(BPFFS, netns)
    assert opened is not None
    return opened


def cookie(mesh: BpfMesh, name: str) -> int:
    """By which the maps know a pod."""
    return next(s.cookie for s in mesh.recorded[name] if isinstance(s, OwnAddress))


def told(mesh: BpfMesh, events: list[Event]) -> list[Told]:
    pods = {cookie(mesh, name): name for name in mesh.recorded}
    return [
        Told(pods[e.netns], e.decision, e.direction, e.destination, e.listener, e.reason)
        for e in events
    ]


def taken(reader: TraceReader) -> list[Event]:
    """What there is; on a slow machine a SYN may be sent, and judged, once more."""
    seen = {replace(event, at=0): event for event in reversed(reader.read(100))}
    return sorted(seen.values(), key=lambda event: event.at)


def hooks(events: list[Event]) -> list[str]:
    return [event.hook for event in events]
