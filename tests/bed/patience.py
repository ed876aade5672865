"""How long tests wait for something before they fail."""

from __future__ import annotations

import os

_FACTOR = float(os.environ.get("PYAMBIENT_TEST_PATIENCE", "1"))


def patience(seconds: float) -> float:
    """`seconds` of an ordinary CPU; an emulated one gets $PYAMBIENT_TEST_PATIENCE times as long."""
    return seconds * _FACTOR
