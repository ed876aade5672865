"""A tunnel: one HBONE connection on its socket, from after the handshake to its end.

General theory of operation
---------------------------
A tunnel joins a `TlsTransport` (bytes on the wire) with an `hbone.Connection` (frames and
streams). Reading: the loop says readable, `fill` decrypts into the loop's shared buffer, the
connection cuts it into frames and calls each stream's sink, which is a relay. Writing: relays
read app bytes straight into the connection's output, behind a frame header, and the tunnel
encrypts and sends that output once a turn.

Backpressure towards the apps: while the socket takes no more, the tunnel is `blocked`; relays
that want to read then `park` themselves and are queued again when it is free. Backpressure from
the apps is HTTP/2's own: a relay credits only what its app has taken. What a blocked tunnel keeps,
as ciphertext and in the connection's output, counts against its pod's and its peer's budget; who
exceeds it loses the tunnel.

A tunnel ends once, by `close(reason)`, whoever calls it: every stream's sink is reset, the socket
is closed, `closed` is set. trio tasks wait for `closed`; nothing on the byte path waits. Where
there is a last word, the GOAWAY for a mistake of the peer's or the end of a drained connection,
`keep_alive`, the tunnel's task, sees it to the peer before the socket is closed and `over` is set.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from typing import Protocol

import trio

from pyambient.hbone import Connection, ErrorCode, RemoteProtocolError
from pyambient.model.address import SocketAddress
from pyambient.model.numbers import PING_INTERVAL, PING_TIMEOUT

from .farewell import linger, reset_on_close
from .loop import GONE, IN, OUT, Loop
from .reservoir import Unread
from .tls import Fill, SharedBuffers, TlsError, TlsTransport

_FLUSH_AT = 64 << 10
# So much in large batches, without a pause of so many seconds between two, is bulk: a small message
# behind it waits for whole buffers to drain.
_SATURATING = 4 << 20
_LULL = 0.2
# For a peer that broke the rules: it may as well never read.
_LAST_WORD_SECONDS = 1.0


class Parked(Protocol):
    """A relay that waits for a blocked tunnel."""

    def resume(self) -> None: ...


class Tunnel:
    """One HBONE connection on the loop; see the top of this file."""

    def __init__(
        self,
        loop: Loop,
        transport: TlsTransport,
        connection: Connection,
        buffers: SharedBuffers,
        peer: SocketAddress,
    ) -> None:
        """Take over the transport's socket; call `start()` when all is wired up."""
        self.loop = loop
        self.connection = connection
        self.peer = peer
        self.closed = trio.Event()
        self.over = trio.Event()
        self.reason = ""
        self.on_close: Callable[[Tunnel], None] | None = None
        self.unread: Unread | None = None
        self._keeps = False
        self._transport = transport
        self._plain = buffers.plain_view
        self._sock: socket.socket = transport.sock
        self._fd = transport.sock.fileno()
        self._watching_out = False
        self._parked: list[Parked] = []
        self._farewell = ""
        # How long the peer may take to hear the last word, if that is still to be seen to it.
        self._last_word: float | None = None
        self._bulk = 0
        self._bulk_at = 0.0

    @property
    def saturated(self) -> bool:
        """Whether bulk is under way: new connections had better go elsewhere."""
        return self._bulk >= _SATURATING and time.monotonic() - self._bulk_at < _LULL

    def _count_bulk(self, count: int) -> None:
        now = time.monotonic()
        if now - self._bulk_at >= _LULL:
            self._bulk = 0
        self._bulk += count
        self._bulk_at = now

    @property
    def blocked(self) -> bool:
        return self._transport.blocked

    @property
    def scarce(self) -> bool:
        """Whether relays had better read small blocks: much is kept for peers that do not read."""
        return self.unread is not None and self.unread.scarce

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def start(self) -> None:
        """Send the connection's first frames and begin to read."""
        self.connection.start()
        self.loop.watch(self._fd, self.on_events, IN)
        self.loop.call_soon(self.read)
        self.loop.flush_soon(self)

    def on_events(self, mask: int) -> None:
        if mask & OUT:
            self.flush()
        if mask & (IN | GONE) and self._fd >= 0:
            self.read()

    def read(self) -> None:
        """Decrypt and process what has arrived, one buffer of it a turn."""
        if self._fd < 0:
            return
        try:
            again = self._read()
        except RemoteProtocolError as violation:
            self._end_after_goaway(f"HTTP/2 error of the peer: {violation}")
        except TlsError as broken:
            self.close(f"tls error: {broken}")
        except OSError as error:
            self.close(f"connection failed: {error.strerror}")
        else:
            if again:
                self.loop.call_soon(self.read)

    def _read(self) -> bool:
        """Whether there is more."""
        count, state = self._transport.fill()
        if count:
            if count >= _FLUSH_AT:
                self._count_bulk(count)
            self.connection.receive(self._plain[:count])
            self.loop.flush_soon(self)
        if state is Fill.EOF:
            self.close("connection closed by the peer")
        return state is Fill.MORE

    def flush(self) -> None:
        """Encrypt and send what the connection has, as far as the socket takes it."""
        if self._fd < 0:
            return
        try:
            self._flush()
        except TlsError as broken:
            self.close(f"tls error: {broken}")
        except OSError as error:
            self.close(f"connection failed: {error.strerror}")
        if self._transport.blocked or self._keeps:
            self._account()

    def _account(self) -> None:
        """Say how much is kept, while the socket takes no more."""
        if self.unread is None or self._fd < 0:
            return
        self._keeps = self.blocked
        kept = self._transport.kept + self.connection.kept if self._keeps else 0
        if not self.unread.keep(kept):
            reset_on_close(self._sock)
            self.close("too much is kept for a peer that does not read")

    def _flush(self) -> None:
        transport, connection = self._transport, self.connection
        was_blocked = transport.blocked
        if was_blocked and not transport.push():
            return
        if connection.pending_count >= _FLUSH_AT:
            self._count_bulk(connection.pending_count)
        while connection.pending_count:
            connection.sent(transport.send(connection.pending))
            if transport.blocked:
                break
        blocked = transport.blocked
        if blocked is not self._watching_out:
            self._watch_out(blocked)
        if blocked:
            return
        if was_blocked:
            self._unpark()
        if self._farewell:
            self.loop.call_soon(self._leave)

    def flush_if_full(self) -> None:
        """Flush now if a good batch is waiting, else at the end of the turn."""
        if self.connection.pending_count >= _FLUSH_AT:
            self.flush()
        else:
            self.loop.flush_soon(self)

    def park(self, relay: Parked) -> None:
        """Resume `relay` when the tunnel is not blocked any more."""
        self._parked.append(relay)

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        for relay in parked:
            self.loop.call_soon(relay.resume)

    def _watch_out(self, wanted: bool) -> None:  # noqa: FBT001 - a state, not an option
        self._watching_out = wanted
        self.loop.rewatch(self._fd, IN | OUT if wanted else IN)

    def drain(self) -> None:
        """Send GOAWAY: the peer opens nothing more here, what is open goes on."""
        if self._fd >= 0:
            self.connection.go_away()
            self.loop.flush_soon(self)

    def finish(self, reason: str) -> None:
        """Close as soon as all that was said has gone out: for a connection that is drained.

        The last END_STREAM may still wait as ciphertext for a blocked socket.
        """
        self._farewell = reason
        self.loop.call_soon(self._leave)

    def _leave(self) -> None:
        if not self.blocked:
            self._end(self._farewell, PING_TIMEOUT)

    def _end_after_goaway(self, reason: str) -> None:
        self.flush()
        self._end(reason, _LAST_WORD_SECONDS)

    def close(self, reason: str) -> None:
        """End the tunnel now: reset every stream, tell the peer if that needs no waiting."""
        self._end(reason, None)
        if self._last_word is not None:
            self._cut()

    def _end(self, reason: str, last_word: float | None) -> None:
        """Nothing happens here any more, but that what was said last gets so many seconds."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        self.reason = reason
        self._last_word = last_word
        self.loop.unwatch(fd)
        if last_word is None:
            self._cut()
        self._unpark()
        self.closed.set()
        if self.on_close is not None:
            self.on_close(self)

    def _cut(self) -> None:
        self._last_word = None
        self.connection.connection_lost(ErrorCode.CONNECT_ERROR)
        self._transport.shutdown()
        self._sock.close()
        if self.unread is not None:
            self.unread.keep(0)
        self.over.set()

    def crashed(self, error: BaseException) -> None:
        """A handler of this tunnel raised: end it, spare the others."""
        self.close(f"internal error: {error!r}")

    async def keep_alive(self) -> None:
        """PING the peer every 10 s; close the tunnel when 20 s bring no answer. Runs until then.

        And until the peer has heard the last word.
        """
        await self._ping_until_closed()
        seconds, self._last_word = self._last_word, None
        if seconds is not None:
            try:
                await self._see_off(seconds)
            finally:
                self._cut()

    async def _ping_until_closed(self) -> None:
        allowed = int(PING_TIMEOUT // PING_INTERVAL)
        while not self.is_closed:
            with trio.move_on_after(PING_INTERVAL):
                await self.closed.wait()
                return
            if self.connection.pings_unanswered >= allowed:
                self.close("HBONE ping timeout: the peer has not answered for 20 s")
                return
            self._transport.give_back()
            self.connection.ping(os.urandom(8))
            self.loop.flush_soon(self)

    async def _see_off(self, seconds: float) -> None:
        """Send what is left, end our side, and wait until the peer has it."""
        connection, transport = self.connection, self._transport
        with trio.move_on_after(seconds), contextlib.suppress(OSError, TlsError):
            while transport.blocked or connection.pending_count:
                if transport.blocked:
                    await trio.lowlevel.wait_writable(self._sock)
                    transport.push()
                else:
                    connection.sent(transport.send(connection.pending))
            transport.shutdown()
            await linger(self._sock, seconds)

    def __repr__(self) -> str:
        state = f"closed ({self.reason})" if self.is_closed else "blocked" if self.blocked else "up"
        return f"<Tunnel with {self.peer}, {self.connection.open_count} streams, {state}>"
