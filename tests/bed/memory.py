"""How much memory processes need at most, by what the kernel notes of their peaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from pyambient.bench.processes import memory_bytes, resident_bytes

# proc(5): resets the peak resident set size to the current one.
_FORGET_PEAK = "5"


@contextlib.contextmanager
def bounded_growth(pids: Iterable[int], most: int) -> Iterator[None]:
    """Fail if the resident memory of a process is ever more than `most` bytes above what it is."""
    before = {}
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text(_FORGET_PEAK)
        before[pid] = resident_bytes(pid)
    yield
    for pid, bytes_before in before.items():
        grown = memory_bytes(pid, "VmHWM") - bytes_before
        assert grown <= most, f"process {pid} has grown by {grown >> 10} KiB"
