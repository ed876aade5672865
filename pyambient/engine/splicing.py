"""Bytes that go from socket to socket inside the kernel: splice(2), by way of a pipe.

General theory of operation
---------------------------
A block is spliced from its source into a pipe, and from there on to its sink. The pipe is empty
before: so EAGAIN of the first step means that the source has nothing, never that the pipe is full,
and EAGAIN of the second that the sink takes nothing. A source is not read while something of it
stands in a pipe, so what a sink that does not read can make us keep is one pipe's fill.

Mostly a pipe is empty again at once. So pipes belong to the loop, a relay borrows one for a block,
and keeps it only while something stands in it. Its pod answers for that with two descriptors and
all the places of the pipe: a place can hold one byte and a whole page with it.

splice(2) does not see everything. It stops short of urgent data, which recv(2) passes over, and
says the end where a FIN came behind that (tcp_read_sock() in net/ipv4/tcp.c). So it is not asked
whether a source is empty or ended: whoever gets nothing of it asks recv(2). An error is different,
as it is told once, to whoever asks first.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import NamedTuple, Protocol

# As much as takes the time of what a relay receives and sends in one turn of the loop.
PIPE_SIZE = 512 << 10
_KEEP = 8
# What says that this kernel, or what watches over this process, does not splice here.
_NOT_HERE = frozenset((errno.EINVAL, errno.ENOSYS, errno.EPERM))
# What recv(2) says as well when it is asked next.
_NOT_NOW = frozenset((errno.EAGAIN, errno.ENOMEM, errno.ENOTCONN))


class Bulk(NamedTuple):
    """From when on a direction's blocks are spliced; a smaller one is cheaper received and sent."""

    moved: int = 1 << 20
    block: int = 16 << 10


_BULK = Bulk()


class Account(Protocol):
    """Who answers for a pipe in use: a pod's budget."""

    def take_pipe(self, size: int) -> bool:
        """Whether there may be one more that can keep so many bytes; `give_pipe` follows."""

    def give_pipe(self, size: int) -> None: ...

    def miss_pipe(self) -> None:
        """There was none; the bytes go another way."""


class Pipe:
    """A pipe, and how many bytes stand in it."""

    __slots__ = ("_into", "_out", "held", "size")

    def __init__(self, size: int) -> None:
        """Of `size` bytes, or as large as the kernel lets it be; OSError without descriptors."""
        self._out, self._into = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # beyond pipe-user-pages-soft, see pipe(7)
            fcntl.fcntl(self._into, fcntl.F_SETPIPE_SZ, size)
        self.size: int = fcntl.fcntl(self._into, fcntl.F_GETPIPE_SZ)
        self.held = 0

    def fill(self, source: int) -> None:
        self.held = os.splice(source, self._into, self.size, flags=os.SPLICE_F_NONBLOCK)

    def drain(self, sink: int) -> None:
        self.held -= os.splice(self._out, sink, self.held, flags=os.SPLICE_F_NONBLOCK)

    def close(self) -> None:
        os.close(self._out)
        os.close(self._into)

    def __repr__(self) -> str:
        return f"<Pipe holding {self.held} of {self.size} bytes>"


class PipePool:
    """The pipes of a loop: the empty ones, made when first needed."""

    def __init__(self, size: int = PIPE_SIZE, keep: int = _KEEP) -> None:
        """At most `keep` of them are kept while nobody needs them."""
        self.size = size
        self.usable = True
        self._keep = keep
        self._free: list[Pipe] = []

    def take(self) -> Pipe:
        """An empty pipe; OSError without descriptors."""
        return self._free.pop() if self._free else Pipe(self.size)

    def give(self, pipe: Pipe) -> None:
        """Take one back; what stands in it is lost."""
        if pipe.held or len(self._free) >= self._keep:
            pipe.close()
        else:
            self._free.append(pipe)

    def close(self) -> None:
        while self._free:
            self._free.pop().close()

    def __repr__(self) -> str:
        return f"<PipePool, {len(self._free)} free>"


class Splicer:
    """Moves blocks by pipes of a pool, on one account; see the top of this file."""

    __slots__ = ("_account", "_bulk", "_pool")

    def __init__(self, pool: PipePool, account: Account, bulk: Bulk = _BULK) -> None:
        self._pool = pool
        self._account = account
        self._bulk = bulk

    def is_bulk(self, moved: int, block: int) -> bool:
        """Whether to splice, of what has moved `moved` bytes, the last `block` of them at once."""
        return block >= self._bulk.block and moved >= self._bulk.moved

    def take_in(self, source: int) -> Pipe | None:
        """A pipe with what the socket `source` has; None where recv(2) is to say what that is.

        `pass_on` or `drop` follows. OSError if the connection broke.
        """
        pool = self._pool
        if not pool.usable or not self._account.take_pipe(pool.size):
            return None
        try:
            pipe = pool.take()
        except OSError:
            self._account.give_pipe(pool.size)
            self._account.miss_pipe()
            return None
        try:
            pipe.fill(source)
        except OSError as error:
            self.drop(pipe)
            if error.errno in _NOT_HERE:
                pool.usable = False
                self._account.miss_pipe()
            elif error.errno not in _NOT_NOW:
                raise
            return None
        if pipe.held:
            return pipe
        self.drop(pipe)
        return None

    def pass_on(self, pipe: Pipe, sink: int) -> bool:
        """Give the socket `sink` what stands in the pipe; whether that was all of it.

        Then the pipe is taken back. BlockingIOError if the sink has to say when it goes on; False
        means to ask again, as a signal may have been the reason. OSError if the connection broke.
        """
        pipe.drain(sink)
        if pipe.held:
            return False
        self.drop(pipe)
        return True

    def drop(self, pipe: Pipe) -> None:
        """The pipe is not needed any more, nor what stands in it."""
        self._pool.give(pipe)
        self._account.give_pipe(self._pool.size)

    def __repr__(self) -> str:
        return f"<Splicer by {self._pool!r}>"
