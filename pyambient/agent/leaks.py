"""What leaves a pod past the mesh, or tries to: counted, and logged with the pod's name.

Once a round each pod's guard is asked what it dropped, and the pod who could send past its guard.
A pod that does so all the time gets a line a round, however much it is.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pyambient.intercept.egress_guard import EgressGuard
from pyambient.intercept.fence import Fence
from pyambient.intercept.guard_maps import Drops, read_drops
from pyambient.intercept.observations import NOTHING, Observations, holders, observations
from pyambient.netns import Netns
from pyambient.observe.logs import get_logger

from .records import Record

_SHOWN: Final = 3
_PACKET_SOCKET: Final = "packet socket"
_XDP_SOCKET: Final = "AF_XDP socket"
# Beside the guards' own reasons: it was to leave by a device that had no guard yet.
_UNGUARDED: Final = "unguarded"
_log = get_logger("guard")


@dataclass(slots=True)
class Leaks:
    """What is known of one pod already: packets dropped by reason, who can pass the guard now.

    `bypasses` counts by kind the sockets that ever could.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    latest: float = 0.0
    senders: Observations = NOTHING
    bypasses: Counter[str] = field(default_factory=Counter)


def look_for_leaks(record: Record, netns: Netns, known: Leaks) -> None:
    """Log what is new since the last look, and note it in `known`."""
    drops = _drops(record, netns)
    if drops is not None:
        _note_drops(record, drops, known)
        _note_senders(record, netns, known)


def describe_leaks(record: Record, netns: Netns | None, known: Leaks) -> dict[str, Any] | None:
    """What to show of the pod, as JSON values; None where nothing guards it."""
    drops = _drops(record, netns)
    return None if drops is None else {**drops.to_json(), "bypasses": dict(known.bypasses)}


def _drops(record: Record, netns: Netns | None) -> Drops | None:
    guards = [step for step in record.steps if isinstance(step, EgressGuard)]
    drops = read_drops(Path(guards[0].bpffs), guards[0].cookie) if guards else None
    if drops is None or netns is None:
        return drops
    held = sum(step.held_back(netns) for step in record.steps if isinstance(step, Fence))
    return dataclasses.replace(drops, counts={**drops.counts, _UNGUARDED: held})


def _note_drops(record: Record, drops: Drops, known: Leaks) -> None:
    added = Counter(drops.counts) - known.dropped
    recent = [str(drop) for drop in drops.last if drop.at > known.latest]
    known.dropped = Counter(drops.counts)
    known.latest = max((drop.at for drop in drops.last), default=known.latest)
    if added:
        what = "was only counted" if record.options.guard == "count" else "was dropped"
        shown = "; ".join(recent[-_SHOWN:])
        _log.warning(f"TCP or DNS past the proxy {what}", pod=str(record.pod), **added, last=shown)


def _note_senders(record: Record, netns: Netns, known: Leaks) -> None:
    now = observations(netns)
    fresh = now.packet_sockets - known.senders.packet_sockets
    names = holders(netns, fresh) if fresh else {}
    found = [(_PACKET_SOCKET, names.get(inode, "unknown")) for inode in sorted(fresh)]
    found += [(_XDP_SOCKET, "unknown")] * (now.xdp_sockets - known.senders.xdp_sockets)
    known.senders = now
    for kind, process in found:
        known.bypasses[kind] += 1
        _log.warning(
            "an app can send past the guard", pod=str(record.pod), by=kind, process=process
        )
