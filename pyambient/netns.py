"""Handles on network namespaces.

General theory of operation
---------------------------
A process can act in another network namespace in two ways: by an fd that belongs there (a socket
stays in the namespace it was made in, for life), or by moving a thread there for a moment with
setns(2). We always do the second to get the first: `Netns.entered()` moves the calling thread,
the caller makes its sockets or writes its sysctls, and the thread moves back. A round trip costs
up to 30 µs, as much as the rest of a connection's system calls: whoever needs many sockets makes
several at once.

Two rules keep this safe. Nothing may await inside `entered()`: another trio task would run in the
pod's namespace. And failing to come back must not be survived, because every later socket of the
process would land in the pod: `entered()` then ends the process.

Two handles are the same namespace if (st_dev, st_ino) of their fds are equal. Inode numbers are
reused after a namespace is gone, cookies (Linux 5.14) are not; both are recorded.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from .errors import UnsupportedFeature, UsageError

CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
_SO_NETNS_COOKIE = 71
_NETNS_DIR = Path("/run/netns")
_libc = ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Netns:
    """An open network namespace; close it, or use it as a context manager."""

    def __init__(self, fd: int, name: str) -> None:
        """Take over `fd`, an open namespace file; `name` is for people."""
        self.fd = fd
        self.name = name
        status = os.fstat(fd)
        self.device = status.st_dev
        self.inode = status.st_ino

    @classmethod
    def open(cls, spec: str) -> Self:
        """Open by name (`ip netns`), path, `pid:N` or `fd:N`; UsageError if there is none."""
        if spec.startswith("pid:"):
            path = Path("/proc") / spec[4:] / "ns/net"
        elif spec.startswith("fd:"):
            path = Path("/proc/self/fd") / spec[3:]
        elif "/" in spec:
            path = Path(spec)
        else:
            path = _NETNS_DIR / spec
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(
                f"network namespace {spec!r} cannot be opened: {error.strerror} ({path})",
                "list the named ones with 'ip netns', or give a path or pid:N",
            ) from None
        try:
            kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != CLONE_NEWNET:
            os.close(fd)
            raise UsageError(
                f"{spec!r} is not a network namespace ({path})",
                "give a name from 'ip netns', a path or pid:N",
            )
        return cls(fd, spec)

    @classmethod
    def own(cls) -> Self:
        """The namespace the calling thread is in."""
        return cls(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC), "this process")

    @classmethod
    def empty(cls) -> Self:
        """A namespace made for the occasion: just a lo that is down; gone when it is closed."""
        with Netns.own() as own, own.entered():
            if _libc.unshare(CLONE_NEWNET):
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), "unshare")
            made = cls.own()
        made.name = "an empty namespace"
        return made

    @property
    def key(self) -> tuple[int, int]:
        """(st_dev, st_ino): equal for two handles on one namespace, while it lives."""
        return (self.device, self.inode)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Move the calling thread into the namespace for the block; never await inside."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(self.fd)
            try:
                yield
            finally:
                try:
                    _setns(home)
                except OSError as error:
                    sys.stderr.write(f"cannot leave network namespace {self.name}: {error}\n")
                    os.abort()
        finally:
            os.close(home)

    def sockets(self, count: int, family: int, kind: int, protocol: int = 0) -> list[socket.socket]:
        """`count` sockets that live in the namespace, made on one visit; OSError if not all are."""
        made: list[socket.socket] = []
        try:
            with self.entered():
                kind |= socket.SOCK_CLOEXEC
                made.extend(socket.socket(family, kind, protocol) for _ in range(count))
        except OSError:
            for sock in made:
                sock.close()
            raise
        return made

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket that lives in the namespace."""
        (made,) = self.sockets(1, family, kind, protocol)
        return made

    def cookie(self) -> int:
        """The number the kernel knows the namespace by and never uses again (Linux 5.14)."""
        with self.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
            except OSError:
                raise UnsupportedFeature("SO_NETNS_COOKIE", "5.14") from None
        return int(struct.unpack("=Q", raw)[0])

    def duplicate(self) -> Netns:
        return Netns(os.dup(self.fd), self.name)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Netns {self.name} inode {self.inode}>"
