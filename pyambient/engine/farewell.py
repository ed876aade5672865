"""How a connection ends without losing what was said last.

close(2) while bytes of the peer are unread, or before more of them come, makes the kernel send a
RST and drop what it has not sent yet: an alert, a GOAWAY, the end of a download. So the socket is
shut for writing, and the peer is read out until it has all of it.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import termios

import trio

_CHUNK = 32 << 10
_BYTES = 256 << 10
_MOMENT = 1.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


def reset_on_close(sock: socket.socket) -> None:
    """Let the other side see a reset when it is closed, and the kernel keep nothing for it."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)


async def linger(sock: socket.socket, seconds: float = _MOMENT) -> None:
    """End our side, and read the peer out until it ends its own.

    It gets one second, and more, up to `seconds`, while its kernel does not have all we sent; no
    more than 256 KiB a second are read. The caller closes the socket.
    """
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return
    with trio.move_on_after(seconds):
        while True:
            with trio.move_on_after(_MOMENT) as moment:
                await _read_out(sock)
            if not moment.cancelled_caught or not _unacknowledged(sock):
                return


async def _read_out(sock: socket.socket) -> None:
    """Until the peer's end; what is more than may be read in a moment waits in the kernel."""
    left = _BYTES
    while left > 0:
        await trio.lowlevel.wait_readable(sock)
        try:
            count = len(sock.recv(_CHUNK))
        except BlockingIOError:
            continue
        except OSError:
            return
        if not count:
            return
        left -= count
    await trio.sleep_forever()


def _unacknowledged(sock: socket.socket) -> int:
    """How many bytes the peer's kernel has not taken."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
