"""Queries of a trial from inside a pod, as they leave the pod: the proof that nobody captured them.

That an answer came proves little: networks exist that answer whatever goes to port 53. A packet
socket sees each packet that a device sends, behind the guard and all that turns packets round. Of
UDP alone: a TCP segment may well be the proxy's own, which tries to pass a connection on.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from typing import Final, Self

from pyambient.model.address import SocketAddress

# RFC 5737 and RFC 3849 reserve these for documentation: nobody but an interceptor can answer.
TARGETS: Final = {"IPv4": SocketAddress("192.0.2.1", 9), "IPv6": SocketAddress("2001:db8::1", 9)}

_ETH_P_ALL: Final = 3
_SO_ATTACH_FILTER: Final = 26
_MOST_PACKETS: Final = 1024
# Classic BPF: load a byte or a word of the packet, mask it, compare it, return.
_BYTE, _WORD, _AND, _EQUALS, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
_IPV4_TARGET, _IPV6_TARGET = 0xC0000201, 0x20010DB8  # of IPv6 the first word
_TO_TARGETS: Final = (
    (_BYTE, 0, 0, 0),
    (_AND, 0, 0, 0xF0),
    (_EQUALS, 0, 4, 0x40),
    (_BYTE, 0, 0, 9),
    (_EQUALS, 0, 7, socket.IPPROTO_UDP),
    (_WORD, 0, 0, 16),
    (_EQUALS, 4, 5, _IPV4_TARGET),
    (_BYTE, 0, 0, 6),
    (_EQUALS, 0, 3, socket.IPPROTO_UDP),
    (_WORD, 0, 0, 24),
    (_EQUALS, 0, 1, _IPV6_TARGET),
    (_RETURN, 0, 0, 0xFFFF),
    (_RETURN, 0, 0, 0),
)


class Departures:
    """The datagrams to TARGETS that devices of the calling thread's network namespace send.

    Making one needs CAP_NET_RAW, looking does not.
    """

    def __init__(self) -> None:
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_PACKET, kind, socket.htons(_ETH_P_ALL))
        try:
            self._attach_filter()
        except OSError:
            self._socket.close()
            raise
        self.device()  # what came before the filter

    def _attach_filter(self) -> None:
        code = ctypes.create_string_buffer(
            b"".join(struct.pack("=HBBI", *instruction) for instruction in _TO_TARGETS)
        )
        program = struct.pack("@HP", len(_TO_TARGETS), ctypes.addressof(code))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)

    def device(self) -> str:
        """By which device something has left since the last call; empty if nothing has."""
        left = ""
        with contextlib.suppress(BlockingIOError):
            for _ in range(_MOST_PACKETS):
                _, (device, _, direction, *_) = self._socket.recvfrom(1)
                if direction == socket.PACKET_OUTGOING and device != "lo":
                    left = device
        return left

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Departures fd {self._socket.fileno()}>"
