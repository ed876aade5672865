"""An AF_XDP socket that sends one frame: past every tc hook, straight to the device."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import socket
import struct
from collections.abc import Iterator

_AF_XDP, _SOL_XDP = 44, 283
_MMAP_OFFSETS, _TX_RING, _UMEM_REG, _FILL_RING, _COMPLETION_RING = 1, 3, 4, 5, 6
_TX_RING_AT = 0x80000000
_COPY = 1 << 1
_CHUNK, _CHUNKS = 4096, 4
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_longlong]


@contextlib.contextmanager
def xdp_sender(device: str) -> Iterator[_Sender]:
    """A sender by `device`; needs CAP_NET_RAW, in the namespace of the caller."""
    with socket.socket(_AF_XDP, socket.SOCK_RAW, 0) as made:
        yield _Sender(made, device)


class _Sender:
    def __init__(self, made: socket.socket, device: str) -> None:
        self._socket = made
        self._memory = mmap.mmap(-1, _CHUNK * _CHUNKS)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        umem = struct.pack("=QQIIII", address, len(self._memory), _CHUNK, 0, 0, 0)
        made.setsockopt(_SOL_XDP, _UMEM_REG, umem)
        for ring in (_FILL_RING, _COMPLETION_RING, _TX_RING):
            made.setsockopt(_SOL_XDP, ring, _CHUNKS)
        self._bind(device)

    def _bind(self, device: str) -> None:
        name = struct.pack("=HHIII", _AF_XDP, _COPY, socket.if_nametoindex(device), 0, 0)
        if _libc.bind(self._socket.fileno(), name, len(name)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def send(self, frame: bytes) -> None:
        self._memory[: len(frame)] = frame
        offsets = self._socket.getsockopt(_SOL_XDP, _MMAP_OFFSETS, 128)
        producer, _, descriptors, _ = struct.unpack_from("=4Q", offsets, 32)
        size = descriptors + 16 * _CHUNKS
        fd, shared, both = self._socket.fileno(), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
        ring = _libc.mmap(None, size, both, shared, fd, _TX_RING_AT)
        ctypes.memmove(ring + descriptors, struct.pack("=QII", 0, len(frame), 0), 16)
        ctypes.memmove(ring + producer, struct.pack("=I", 1), 4)
        if _libc.sendto(fd, None, 0, socket.MSG_DONTWAIT, None, 0) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
