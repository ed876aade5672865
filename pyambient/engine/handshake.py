"""TLS handshakes, as trio tasks: they wait, so they are not the loop's.

A handshake that fails sends its alert and closes without losing it: unread bytes of the peer
would turn our close into a RST that overtakes the alert, so the socket is shut for writing and
read out for a moment first.
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
_LINGER_SECONDS = 1.0
_LINGER_BYTES = 256 << 10


class HandshakeFailed(Exception):
    """The TLS handshake failed; the text is the reason, in OpenSSL's words."""


async def handshake(
    sock: socket.socket, context: SSL.Context, pacer: Pace, *, server: bool
) -> SSL.Connection:
    """Make the TLS connection of non-blocking `sock`; HandshakeFailed or OSError if it fails.

    The caller closes the socket, after `linger(sock)` where an alert may be under way.
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


async def linger(sock: socket.socket) -> None:
    """Let what was sent last arrive: end our side, and read the peer out for a moment."""
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return
    with trio.move_on_after(_LINGER_SECONDS):
        for _ in range(_LINGER_BYTES // _CHUNK):
            await trio.lowlevel.wait_readable(sock)
            try:
                if not sock.recv(_CHUNK):
                    return
            except BlockingIOError:
                continue
            except OSError:
                return
