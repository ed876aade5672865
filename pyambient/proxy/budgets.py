"""What one pod, and one peer, may take of a proxy process before others have to do without.

General theory of operation
---------------------------
Pods share a process, so each has a budget: of descriptors, of handshakes under way, of bytes that
are kept for apps and peers that do not read. Peers have one, too: a handshake costs us half a
millisecond and its sender a packet, so a source address may begin only so many of them, and have
only so many under way; and only so much is kept for a peer in all of its tunnels. Sums over all
pods and sources are bounded as well. (Shares of a loop's turn are the engine's:
`engine/pacing.py`.)

Whoever asks for more is refused at once, at the least cost, and counted in `refused` by the name of
the budget. The log says so at most once in ten seconds for each pod and budget, with the number:
a line for each refusal would be the next flood. Whoever is refused a pipe loses nothing by that,
and is only counted.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from pyambient.engine.reservoir import Reservoir
from pyambient.model.numbers import QUERIES_IN_FLIGHT
from pyambient.observe.logs import get_logger
from pyambient.observe.seldom import Seldom

_log = get_logger("budgets")
# Descriptors that are no connection's: listeners, namespaces, tunnels, the loop's own.
_OTHER_DESCRIPTORS = 512
_SOURCES_MAX = 4096

DESCRIPTORS = "descriptors"
HANDSHAKES = "handshakes under way"
HANDSHAKE_RATE = "handshakes of one source"
SOURCE_HANDSHAKES = "handshakes of one source under way"
BUFFERED = "buffered bytes"
PEER_BUFFERED = "buffered bytes of one peer"
PIPES = "pipes"
_ENDS_OF_A_PIPE = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers. A pod's are shares of the process's, so that the last quarter is for others."""

    descriptors: int
    handshakes: int = 512
    pod_handshakes: int = 128
    # Who never finishes one keeps its place for ten seconds: a quarter of the pod's places.
    source_handshakes: int = 32
    # A peer opens a tunnel for a hundred connections, and reopens them all when we restart.
    source_burst: int = 200
    source_rate: float = 50.0
    total_burst: int = 1000
    total_rate: float = 400.0
    buffered: int = 512 << 20
    pod_buffered: int = 128 << 20
    peer_buffered: int = 32 << 20
    queries: int = QUERIES_IN_FLIGHT

    @property
    def pod_descriptors(self) -> int:
        return self.descriptors * 3 // 4

    @classmethod
    def of_process(cls, workers: int = 1) -> Limits:
        """As many descriptors as this process may open.

        What takes the node's memory is divided among the workers. What takes the time or the
        descriptors of a process is each worker's own.
        """
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        whole = cls(max(soft - _OTHER_DESCRIPTORS, _OTHER_DESCRIPTORS))
        return dataclasses.replace(
            whole,
            buffered=whole.buffered // workers,
            pod_buffered=whole.pod_buffered // workers,
            peer_buffered=whole.peer_buffered // workers,
            queries=whole.queries // workers,
        )


class Bucket:
    """A token bucket: `burst` at once, then `rate` a second."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, burst: int, rate: float, now: float) -> None:
        self._burst, self._rate = float(burst), rate
        self._left, self._at = float(burst), now

    def take(self, now: float) -> bool:
        """One token, if there is one."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Budgets:
    """The process's; `pod` makes those of a pod."""

    def __init__(
        self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits or Limits.of_process()
        self.refused: Counter[str] = Counter()
        self.descriptors = 0
        self.handshakes = 0
        self.handshakes_of: Counter[str] = Counter()
        self.buffered = Reservoir(self.limits.buffered)
        self.buffered_for: Counter[str] = Counter()
        self.clock = clock
        self._all_sources = Bucket(self.limits.total_burst, self.limits.total_rate, clock())
        self._sources: OrderedDict[str, Bucket] = OrderedDict()

    def pod(self, name: str) -> PodBudget:
        return PodBudget(self, name)

    def source_may(self, source: str) -> bool:
        """Whether `source`, an address, may begin another handshake."""
        now = self.clock()
        bucket = self._sources.get(source)
        if bucket is None:
            bucket = Bucket(self.limits.source_burst, self.limits.source_rate, now)
            self._sources[source] = bucket
            if len(self._sources) > _SOURCES_MAX:
                self._sources.popitem(last=False)
        self._sources.move_to_end(source)
        return bucket.take(now) and self._all_sources.take(now)

    def __repr__(self) -> str:
        return f"<Budgets: {self.descriptors} of {self.limits.descriptors} descriptors>"


class PodBudget:
    """What one pod has taken, and whether it may take more."""

    def __init__(self, whole: Budgets, name: str) -> None:
        self.name = name
        self.refused: Counter[str] = Counter()
        self.descriptors = 0
        self.handshakes = 0
        self.buffered = Reservoir(whole.limits.pod_buffered, whole.buffered)
        self.buffered.on_full = lambda: self.refuse(BUFFERED)
        self._whole = whole
        self._warnings: dict[str, Seldom] = {}

    def refuse(self, budget: str) -> None:
        """Count a refusal, and say so if that has not been said lately."""
        self.refused[budget] += 1
        self._whole.refused[budget] += 1
        if budget not in self._warnings:
            self._warnings[budget] = Seldom(
                _log, "budget used up, refusing", clock=self._whole.clock
            )
        self._warnings[budget].warn(pod=self.name, budget=budget)

    def may_take(self, descriptors: int) -> bool:
        """Whether there are so many for another connection; if not, refuse it."""
        if self._has_room(descriptors):
            return True
        self.refuse(DESCRIPTORS)
        return False

    def _has_room(self, descriptors: int) -> bool:
        limits, whole = self._whole.limits, self._whole
        return (
            self.descriptors + descriptors <= limits.pod_descriptors
            and whole.descriptors + descriptors <= limits.descriptors
        )

    def take(self, count: int) -> None:
        """A connection has so many descriptors; `give` them back when it is over."""
        self.descriptors += count
        self._whole.descriptors += count

    def give(self, count: int) -> None:
        self.descriptors -= count
        self._whole.descriptors -= count

    def take_pipe(self, size: int) -> bool:
        """Whether bulk may go by a pipe that can keep so much; if not, it goes as all else does.

        So nobody is refused anything, and the log has nothing to say.
        """
        if not self._has_room(_ENDS_OF_A_PIPE) or not self.buffered.fits(size):
            self.miss_pipe()
            return False
        self.take(_ENDS_OF_A_PIPE)
        self.buffered.take(size)
        return True

    def give_pipe(self, size: int) -> None:
        self.give(_ENDS_OF_A_PIPE)
        self.buffered.give(size)

    def miss_pipe(self) -> None:
        """Count that there was none."""
        self.refused[PIPES] += 1
        self._whole.refused[PIPES] += 1

    def unread(self, peer: str) -> Unread:
        """What another tunnel with `peer`, an address, may keep for it."""
        return Unread(self, self._whole, peer)

    def begin_handshake(self, source: str) -> str:
        """Why a peer's handshake may not begin, or nothing; then `end_handshake` follows."""
        limits, whole = self._whole.limits, self._whole
        if whole.handshakes_of[source] >= limits.source_handshakes:
            refused = SOURCE_HANDSHAKES
        elif self.handshakes >= limits.pod_handshakes or whole.handshakes >= limits.handshakes:
            refused = HANDSHAKES
        elif not whole.source_may(source):
            refused = HANDSHAKE_RATE
        else:
            self.handshakes += 1
            whole.handshakes += 1
            whole.handshakes_of[source] += 1
            return ""
        self.refuse(refused)
        return refused

    def end_handshake(self, source: str) -> None:
        self.handshakes -= 1
        whole = self._whole
        whole.handshakes -= 1
        whole.handshakes_of[source] -= 1
        if not whole.handshakes_of[source]:
            del whole.handshakes_of[source]

    def __repr__(self) -> str:
        return f"<PodBudget of {self.name}: {self.descriptors} descriptors, {self.buffered!r}>"


class Unread:
    """What one tunnel keeps for a peer that does not read: of the pod's, the peer's and all."""

    __slots__ = ("_held", "_peer", "_pod", "_whole")

    def __init__(self, pod: PodBudget, whole: Budgets, peer: str) -> None:
        self._pod, self._whole, self._peer = pod, whole, peer
        self._held = 0

    @property
    def scarce(self) -> bool:
        whole, pod = self._whole, self._pod.buffered
        held = whole.buffered_for[self._peer]
        return (
            2 * held > whole.limits.peer_buffered
            or 2 * pod.held > pod.limit
            or 2 * whole.buffered.held > whole.buffered.limit
        )

    def keep(self, count: int) -> bool:
        more = count - self._held
        if more > 0 and not self._may_keep(more):
            return False
        if more < 0:
            self._pod.buffered.give(-more)
        self._held = count
        held = self._whole.buffered_for
        held[self._peer] += more
        if not held[self._peer]:
            del held[self._peer]
        return True

    def _may_keep(self, more: int) -> bool:
        whole = self._whole
        if whole.buffered_for[self._peer] + more > whole.limits.peer_buffered:
            self._pod.refuse(PEER_BUFFERED)
            return False
        return self._pod.buffered.take(more)

    def __repr__(self) -> str:
        return f"<Unread of {self._peer}: {self._held} bytes>"
