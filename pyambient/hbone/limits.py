"""How much a peer may ask for without giving anything: the answers to HTTP/2's known floods.

Some frames cost the receiver work and the sender nothing: a CONNECT that is reset at once (rapid
reset, CVE-2023-44487), a mistake that makes *us* reset (CVE-2025-8671), SETTINGS and PING
(CVE-2019-9512, -9515), empty DATA (CVE-2019-9518). Each kind draws from a budget that refills with
time; when it is empty the peer loses the connection with ENHANCE_YOUR_CALM. Header blocks
(CVE-2024-27316) and pending output are bounded by size instead, where they are kept.
"""

from __future__ import annotations

from collections.abc import Callable

from .errors import ErrorCode, RemoteProtocolError

Clock = Callable[[], float]


class Budget:
    """A token bucket: `burst` at once, then `rate` a second. The clock is read only on use."""

    __slots__ = ("_at", "_burst", "_clock", "_left", "_rate", "_what")

    def __init__(self, what: str, burst: int, rate: float, clock: Clock) -> None:
        """`what` is counted, in the plural; `clock` tells seconds, from any start."""
        self._what = what
        self._burst = float(burst)
        self._left = float(burst)
        self._rate = rate
        self._clock = clock
        self._at = clock()

    def spend(self) -> None:
        """Count one; RemoteProtocolError when there were too many."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            raise RemoteProtocolError(ErrorCode.ENHANCE_YOUR_CALM, f"too many {self._what}")
        self._left -= 1

    def __repr__(self) -> str:
        return f"<Budget for {self._left:.0f} {self._what}>"


def wasted_streams(clock: Clock) -> Budget:
    """Streams reset before their answer, refused, or broken by the peer.

    A stream that was answered cost its sender a round trip and is not counted, so an app that
    resets its connections (health checks do) never gets near.
    """
    return Budget("streams asked for and wasted", burst=1000, rate=100.0, clock=clock)


def idle_frames(clock: Clock) -> Budget:
    """Frames that move nothing: SETTINGS, PING, PRIORITY, GOAWAY, empty DATA, unknown types."""
    return Budget("frames that move nothing", burst=1000, rate=100.0, clock=clock)
