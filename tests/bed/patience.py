"""How long tests wait for something before they fail."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_FACTOR = float(os.environ.get("PYAMBIENT_TEST_PATIENCE", "1"))


def patience(seconds: float) -> float:
    """`seconds` of an ordinary CPU; an emulated one gets $PYAMBIENT_TEST_PATIENCE times as long."""
    return seconds * _FACTOR


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    """Until the condition is true; AssertionError after `patience(seconds)`."""
    deadline = time.monotonic() + patience(seconds)
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
