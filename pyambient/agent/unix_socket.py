"""The agent's unix sockets: for root alone, and for a bounded number of clients at a time."""

from __future__ import annotations

import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import trio

from pyambient.observe.logs import get_logger

_BACKLOG: Final = 16
_UCRED: Final = struct.Struct("iII")
_log = get_logger("agent")


async def serve(
    path: Path,
    kind: socket.SocketKind,
    most: int,
    handle: Callable[[trio.socket.SocketType], Awaitable[None]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Have `handle` serve each client at `path`, for ever; started when it listens.

    While there are `most` of them, the next one is closed at once.
    """
    with _listen(path, kind) as listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                connection, _ = await listener.accept()
                if len(nursery.child_tasks) < most:
                    nursery.start_soon(handle, connection)
                    continue
                _log.warning("too many clients, one is refused", socket=path.name, limit=most)
                connection.close()


def _listen(path: Path, kind: socket.SocketKind) -> trio.socket.SocketType:
    """A socket that listens at `path`; a stale one there is removed."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    listener.bind(str(path))
    path.chmod(0o600)
    listener.listen(_BACKLOG)
    return trio.socket.from_stdlib_socket(listener)


def peer_pid(connection: trio.socket.SocketType) -> int:
    """The process that connected, by the kernel's word (SO_PEERCRED)."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(raw)[0])
