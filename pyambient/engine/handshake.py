"""TLS handshakes, as trio tasks: they wait, so they are not the loop's.

A handshake that fails sends its alert, which may still be under way then.
"""

from __future__ import annotations

import socket
from contextlib import AbstractAsyncContextManager

import trio
from OpenSSL import SSL

from .tls import describe

Pace = AbstractAsyncContextManager[None]
"""What a handshake enters for each of its steps: `pacing.Pacer`."""
_CHUNK = 32 << 10


class HandshakeFailed(Exception):
    """The TLS handshake failed; the text is the reason, in OpenSSL's words."""


async def handshake(
    sock: socket.socket, context: SSL.Context, pacer: Pace, *, server: bool
) -> SSL.Connection:
    """Make the TLS connection of non-blocking `sock`; HandshakeFailed or OSError if it fails.

    The caller closes the socket, after `farewell.linger(sock)` where an alert may be under way.
    """
    connection = SSL.Connection(context, None)
    if server:
        connection.set_accept_state()
    else:
        connection.set_connect_state()
    while True:
        finished = await _step(sock, connection, pacer)
        await _send_pending(sock, connection)
        if finished:
            return connection
        await _receive(sock, connection)


async def _step(sock: socket.socket, connection: SSL.Connection, pacer: Pace) -> bool:
    try:
        async with pacer:
            connection.do_handshake()
    except SSL.WantReadError:
        return False
    except SSL.Error as error:
        await _send_pending(sock, connection)
        raise HandshakeFailed(describe(error)) from None
    return True


async def _send_pending(sock: socket.socket, connection: SSL.Connection) -> None:
    try:
        pending = memoryview(connection.bio_read(1 << 20))
    except SSL.WantReadError:
        return
    while pending:
        try:
            pending = pending[sock.send(pending) :]
        except BlockingIOError:
            await trio.lowlevel.wait_writable(sock)


async def _receive(sock: socket.socket, connection: SSL.Connection) -> None:
    while True:
        try:
            data = sock.recv(_CHUNK)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            continue
        if not data:
            raise HandshakeFailed("the peer closed the connection during the TLS handshake")
        connection.bio_write(data)
        return
