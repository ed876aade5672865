"""The reader's end of a BPF ring buffer (BPF_MAP_TYPE_RINGBUF, Linux 5.8).

libbpf does the reading: the positions that kernel and reader share have to be read and written in
an order that Python cannot promise on every CPU.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Final, Self

from . import libbpf
from .kernel_objects import Map, MapType

_Sample: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class RingBuffer:
    """A ring of its own and its one reader; close it, or use it as a context manager."""

    def __init__(self, name: str, size: int) -> None:
        """`size` in bytes is a power of two, and pages; MemoryError and OSError as they come."""
        self.map = Map.create(MapType.RINGBUF, name, (0, 0), size, 0)
        self._taken: list[bytes] = []
        self._most = 0
        # The library calls it for as long as the handle lives, so the reference has to stay.
        self._callback = _Sample(self._take)
        try:
            arguments = (self.map.fd, ctypes.cast(self._callback, ctypes.c_void_p), None, None)
            self._handle: int | None = libbpf.call("ring_buffer__new", *arguments)
        except BaseException:
            self.map.close()
            raise

    def fileno(self) -> int:
        """Readable while there is something to read."""
        return self.map.fd

    def read(self, most: int) -> list[bytes]:
        """What is there, oldest first, and no more than `most` of it."""
        self._taken, self._most = [], most
        libbpf.ask("ring_buffer__consume", self._handle)
        return self._taken

    def _take(self, _: int, data: int, size: int) -> int:
        self._taken.append(ctypes.string_at(data, size))
        return -errno.ECANCELED if len(self._taken) >= self._most else 0

    def close(self) -> None:
        if self._handle is not None:
            libbpf.ask("ring_buffer__free", self._handle)
            self._handle = None
        self.map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RingBuffer {self.map.name}{'' if self._handle else ' closed'}>"
