"""Warnings that may be due thousands of times a second, as a line now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

INTERVAL: Final = 10.0


class Seldom:
    """Logs one warning per `interval` seconds; it says how often it was due since the last one."""

    def __init__(
        self,
        log: FilteringBoundLogger,
        message: str,
        interval: float = INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log = log
        self._message = message
        self._interval = interval
        self._clock = clock
        self._count = 0
        self._quiet_until = -math.inf

    def warn(self, **fields: Any) -> None:
        """It happened again; `fields` are logged if this one is."""
        self._count += 1
        now = self._clock()
        if now < self._quiet_until:
            return
        self._quiet_until = now + self._interval
        count, self._count = self._count, 0
        self._log.warning(self._message, times=count, **fields)

    def __repr__(self) -> str:
        return f"<Seldom {self._message!r}, {self._count} unsaid>"
