"""DNS messages on a stream: each behind its length in two bytes (RFC 1035 section 4.2.2)."""

from __future__ import annotations

from typing import Final

MAX_MESSAGE: Final = 65535
_PREFIX: Final = 2


def framed(message: bytes) -> bytes:
    """`message` as it goes on a stream, in one piece (RFC 7766 section 8)."""
    return len(message).to_bytes(_PREFIX) + message


class Frames:
    """Bytes of a stream in, messages out.

    It holds what it is fed, so feed it no more while `next` has something to give.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> None:
        self._buffer += data

    def next(self) -> bytes | None:
        """The next whole message, None if it has not arrived yet."""
        buffer = self._buffer
        end = _PREFIX + int.from_bytes(buffer[:_PREFIX])
        if len(buffer) < end:
            return None
        message = bytes(buffer[_PREFIX:end])
        del buffer[:end]
        return message

    def __repr__(self) -> str:
        return f"<Frames {len(self._buffer)} bytes>"
