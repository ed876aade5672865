"""A table of iptables-legacy as the kernel has it, without starting a program.

linux/netfilter_ipv4/ip_tables.h and its IPv6 twin: two getsockopt calls, the second one's answer a
row of entries that each say where the next one is.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from typing import Final, NamedTuple

from pyambient.netns import Netns

# IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES; those of IPv6 have the same numbers.
_GET_INFO: Final = 64
_GET_ENTRIES: Final = 65
_NAME: Final = struct.Struct("=32s")
_INFO_BYTES: Final = 84
_SIZE_OF_INFO: Final = 80
_ENTRIES_AT: Final = 40
_COUNTERS: Final = bytes(16)
_libc = ctypes.CDLL(None, use_errno=True)


class _Layout(NamedTuple):
    """Where in an entry its length and its counters are; `level` is getsockopt's."""

    family: int
    level: int
    next_offset: int
    counters: int


_IPV4: Final = _Layout(socket.AF_INET, socket.IPPROTO_IP, 90, 96)
_IPV6: Final = _Layout(socket.AF_INET6, socket.IPPROTO_IPV6, 142, 152)


def read_table(netns: Netns, table: str, *, ipv6: bool) -> bytes:
    """All entries of a table that is alive, as bytes for comparing: packet counters are zero.

    OSError where there is no such table.
    """
    layout = _IPV6 if ipv6 else _IPV4
    with netns.socket(layout.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as kernel:
        info = bytearray(_NAME.pack(table.encode()).ljust(_INFO_BYTES, b"\0"))
        _getsockopt(kernel, layout.level, _GET_INFO, info)
        (size,) = struct.unpack_from("=I", info, _SIZE_OF_INFO)
        entries = bytearray(_ENTRIES_AT + size)
        struct.pack_into("=32sI", entries, 0, table.encode(), size)
        _getsockopt(kernel, layout.level, _GET_ENTRIES, entries)
    return _without_counters(entries[_ENTRIES_AT:], layout)


def _getsockopt(kernel: socket.socket, level: int, option: int, value: bytearray) -> None:
    """As socket.getsockopt, which cannot pass the name of the table along."""
    size = ctypes.c_uint32(len(value))
    place = (ctypes.c_char * len(value)).from_buffer(value)
    if _libc.getsockopt(kernel.fileno(), level, option, place, ctypes.byref(size)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _without_counters(entries: bytearray, layout: _Layout) -> bytes:
    start = 0
    while start + layout.counters < len(entries):
        (length,) = struct.unpack_from("=H", entries, start + layout.next_offset)
        counters = start + layout.counters
        entries[counters : counters + len(_COUNTERS)] = _COUNTERS
        start += max(length, layout.counters)
    return bytes(entries)
