"""DNS messages over one TCP connection, in both directions (RFC 7766)."""

from __future__ import annotations

import socket
from typing import Final, Protocol

from pyambient.dns.framing import Frames, framed
from pyambient.engine.loop import IN, OUT, RESET, Loop

_READ: Final = 64 << 10


class StreamOwner(Protocol):
    """What a stream tells; each call may close it."""

    def message(self, stream: MessageStream, message: bytes) -> None:
        """One whole message arrived."""

    def ended(self, stream: MessageStream) -> None:
        """The other side sends no more: it said FIN, or the connection broke (it is closed)."""

    def sent(self, stream: MessageStream) -> None:
        """All that was to be sent has gone out."""

    def crashed(self, error: BaseException) -> None: ...


class MessageStream:
    """A connected socket that carries messages; nothing of it raises.

    What is received is bounded by the owner, who pauses reading; so is what is unsent, because the
    owner does not ask for more answers while `unsent` is much.
    """

    def __init__(self, loop: Loop, sock: socket.socket, owner: StreamOwner) -> None:
        """Take over non-blocking `sock` and begin to read."""
        self._loop = loop
        self._sock = sock
        self._owner = owner
        self._frames = Frames()
        self._out = bytearray()
        self._paused = self._half_closed = False
        self._mask = IN
        loop.watch(sock.fileno(), self._on_events, IN)

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    @property
    def half_closed(self) -> bool:
        """Whether the other side has said that it sends no more."""
        return self._half_closed

    @property
    def unsent(self) -> int:
        return len(self._out)

    def send(self, message: bytes) -> None:
        """Send a message with the others of this turn."""
        if not self.closed:
            self._out += framed(message)
            self._loop.flush_soon(self)

    def pause(self) -> None:
        """Hand out no more messages until `resume`."""
        self._paused = True
        self._watch()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self._watch()
            # Messages that are here already cause no event.
            self._loop.call_soon(self._hand_out)

    def _on_events(self, mask: int) -> None:
        if mask & RESET:
            self._break()
            return
        if mask & OUT:
            self.flush()
        if mask & IN and not self.closed:
            self._read()

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            self._break()
            return
        self._frames.feed(data)
        self._hand_out()
        if not data and not self.closed:
            self._half_closed = True
            self._watch()
            self._owner.ended(self)

    def _hand_out(self) -> None:
        while not self._paused and not self.closed:
            message = self._frames.next()
            if message is None:
                return
            self._owner.message(self, message)

    def flush(self) -> None:
        """Send what is unsent, as far as the socket takes it."""
        if self.closed:
            return
        try:
            while self._out:
                del self._out[: self._sock.send(self._out)]
        except BlockingIOError:
            self._watch()
            return
        except OSError:
            self._break()
            return
        self._watch()
        self._owner.sent(self)

    def _watch(self) -> None:
        if self.closed:
            return
        reading = 0 if self._paused or self._half_closed else IN
        mask = reading | (OUT if self._out else 0)
        if mask != self._mask:
            self._mask = mask
            self._loop.rewatch(self._sock.fileno(), mask)

    def _break(self) -> None:
        self.close()
        self._owner.ended(self)

    def close(self) -> None:
        """Close at once, with whatever is unsent."""
        if not self.closed:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()

    def crashed(self, error: BaseException) -> None:
        self._owner.crashed(error)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "paused" if self._paused else "open"
        return f"<MessageStream {state}, {len(self._out)} bytes unsent>"
