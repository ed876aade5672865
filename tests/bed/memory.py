"""How much memory processes need at most, by what the kernel notes of their peaks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

# proc(5): resets the peak resident set size to the current one.
_FORGET_PEAK = "5"


@contextlib.contextmanager
def bounded_growth(pids: Iterable[int], most: int) -> Iterator[None]:
    """Fail if the resident memory of a process is ever more than `most` bytes above what it is."""
    before = {}
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text(_FORGET_PEAK)
        before[pid] = _status(pid, "VmRSS")
    yield
    for pid, bytes_before in before.items():
        grown = _status(pid, "VmHWM") - bytes_before
        assert grown <= most, f"process {pid} has grown by {grown >> 10} KiB"


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(pid)
