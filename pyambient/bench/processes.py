"""What the kernel says of a running process: CPU time and memory."""

from __future__ import annotations

import time
from pathlib import Path

_CPUCLOCK_SCHED = 2


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, user and kernel, to the nanosecond.

    The clock id is what clock_getcpuclockid(3) makes of a pid.
    """
    return time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)


def resident_bytes(pid: int) -> int:
    """Resident memory of a process; what it shares with others counts in full."""
    return memory_bytes(pid, "VmRSS")


def memory_bytes(pid: int, what: str) -> int:
    """Of /proc/PID/status, what is about memory, such as VmHWM: the most that was resident."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(pid)
