"""The garbage collector of a process whose connections leave no garbage.

A finished connection is in no reference cycle, so its memory is free at once. What is left for the
collector are the rare cycles of tasks and exceptions. Its full collections would walk through
everything that was imported and every connection that is open, for milliseconds, and find nothing.
"""

from __future__ import annotations

import gc

# Objects made minus objects freed before the youngest generation is looked at; Python's is 700.
_YOUNG = 50_000


def calm() -> None:
    """Leave what exists now out of all collections, and collect the rest seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 20, 50)
