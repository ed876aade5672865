"""The proxy's share of a CPU, in small pieces.

A proxy under load wants all of a CPU, and so do not the apps beside it: they want it at once, for a
moment, whenever an answer comes. The kernel lets whoever has the CPU keep it for a slice (3 ms on
most machines), and a connection that crosses two proxies waits for several of them. With slices of
our own that are short (Linux 6.12, EEVDF) an app waits for one of ours at the most, and we get our
share all the same. Earlier kernels take the same call and let it have no effect.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys

# uapi/linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_NUMBERS = {"x86_64": (314, 315), "aarch64": (274, 275)}
# Of the lengths that the kernel allows the shortest: see docs/performance.md.
SLICE = 100_000
_libc = ctypes.CDLL(None, use_errno=True)


def shorten_slices(nanoseconds: int) -> bool:
    """Ask for slices of this length for the calling thread; whether the kernel took it.

    All else about its scheduling stays as it is. The kernel keeps lengths within 0.1 to 100 ms.
    """
    numbers = _NUMBERS.get(os.uname().machine)
    if numbers is None or not sys.platform.startswith("linux"):
        return False
    set_attributes, get_attributes = numbers
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if _libc.syscall(get_attributes, 0, buffer, _ATTRIBUTES.size, 0):
        return False
    size, policy, flags, nice, priority, _, deadline, period = _ATTRIBUTES.unpack(buffer.raw)
    wanted = _ATTRIBUTES.pack(size, policy, flags, nice, priority, nanoseconds, deadline, period)
    return not _libc.syscall(set_attributes, 0, wanted, 0)


def slice_length() -> int | None:
    """What the calling thread's slices are asked to be, in nanoseconds; None if unknown."""
    numbers = _NUMBERS.get(os.uname().machine)
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if numbers is None or _libc.syscall(numbers[1], 0, buffer, _ATTRIBUTES.size, 0):
        return None
    return int(_ATTRIBUTES.unpack(buffer.raw)[5])
