"""The proxy's share of a CPU, in small pieces.

A proxy under load wants all of a CPU. The apps beside it want it at once and for a moment, whenever
an answer comes. The kernel lets whoever has the CPU keep it for a slice (1.4 ms with two CPUs, more
with more of them), and a connection that crosses two proxies waits for several. With short slices
of ours (Linux 6.12, EEVDF) an app waits for one of these at the most, and we get our share all the
same. Earlier kernels take the same call and let it have no effect.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

# uapi/linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES: Final = struct.Struct("=IIQiIQQQ")
_RUNTIME: Final = 5
# Of sched_setattr(2) and sched_getattr(2), which libc has no functions for before glibc 2.41.
_NUMBERS: Final = {"x86_64": (314, 315), "aarch64": (274, 275)}
# Nanoseconds. The kernel allows no shorter ones.
_SLICE: Final = 100_000
_libc = ctypes.CDLL(None, use_errno=True)


def shorten_slices() -> bool:
    """Ask for short slices for the calling thread; whether the kernel took it.

    All else about its scheduling stays as it is.
    """
    numbers = _NUMBERS.get(os.uname().machine)
    if numbers is None:
        return False
    set_attributes, get_attributes = numbers
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if _libc.syscall(get_attributes, 0, buffer, _ATTRIBUTES.size, 0):
        return False
    attributes = list(_ATTRIBUTES.unpack(buffer.raw))
    attributes[_RUNTIME] = _SLICE
    return not _libc.syscall(set_attributes, 0, _ATTRIBUTES.pack(*attributes), 0)
