"""TLS of one tunnel over memory BIOs: one recv(2) and one send(2) for a batch of records.

General theory of operation
---------------------------
OpenSSL on a socket makes one write(2) per 16 KiB record and two read(2) per record, which costs
bulk transfers a third of their CPU. Over memory BIOs we choose: `fill()` receives what the socket
has into one shared buffer, feeds it, and decrypts until OpenSSL wants more; `send()` encrypts up
to 256 KiB and gives the whole batch to the socket at once.

Two consequences. Plaintext may sit in the BIO while the socket is empty, which level-triggered
epoll cannot see: `fill()` says MORE when it stopped for lack of room, and the tunnel must come
back. And encrypting never blocks, so what the socket did not take stays in the write BIO as
ciphertext; while there is some, the tunnel is blocked and takes nothing more from its apps.

pyOpenSSL's public calls copy every record through a fresh buffer. `_RawCalls` reaches the same
BIOs through the cffi library underneath, whose names are private; `_PublicCalls` is the fallback
for a pyOpenSSL that changes them. Both pass the same tests.
"""

from __future__ import annotations

import enum
import socket
from typing import Any, Protocol

from OpenSSL import SSL

PLAIN_SIZE = 256 << 10
_CIPHER_SIZE = 128 << 10
_WRITE_MAX = 256 << 10
# What is larger in a BIO is worth giving back when a tunnel is idle.
_LARGE = 16 << 10
# A TLS record carries at most 16 KiB (RFC 8446 section 5.1).
_RECORD = 16 << 10
_WANT_READ = 2
_ZERO_RETURN = 6


class TlsError(Exception):
    """The peer's TLS failed: an alert, a bad record, a truncated stream."""


class Fill(enum.IntEnum):
    """Why `fill` stopped."""

    DRAINED = 0
    MORE = 1
    EOF = 2


class SharedBuffers:
    """The receive buffers of a loop: their content lives only until the next `fill`."""

    def __init__(self) -> None:
        self.plain = bytearray(PLAIN_SIZE)
        self.plain_view = memoryview(self.plain)
        self.cipher = bytearray(_CIPHER_SIZE)
        self.cipher_view = memoryview(self.cipher)
        self.scratch = bytearray(_WRITE_MAX * 2)


class _Calls(Protocol):
    """What is done with the two BIOs of a connection."""

    def read(self, start: int) -> int:
        """Decrypt into the shared plain buffer from `start`; 0 at close_notify, -1 if none."""

    def drained(self) -> bool:
        """Whether `read` is known to have nothing more; False if only `read` can tell."""

    def feed(self, count: int) -> None:
        """`count` bytes of the shared cipher buffer came from the network."""

    def write(self, view: memoryview) -> int:
        """Encrypt `view` into the write BIO."""

    def unsent(self) -> Any:
        """The ciphertext to send, as a buffer; false when there is none."""

    def sent(self, count: int) -> None:
        """`count` bytes of `unsent()` have gone out."""

    def renew(self) -> bool:
        """Give back what empty BIOs have grown to; False if they hold something."""


def describe(error: SSL.Error) -> str:
    """OpenSSL's own reason, in one phrase."""
    if error.args and isinstance(error.args[0], list) and error.args[0]:
        return str(error.args[0][-1][-1]) or "TLS failure"
    return "unexpected end of stream" if isinstance(error, SSL.SysCallError) else "TLS failure"


class _PublicCalls:
    """The BIOs through pyOpenSSL's documented calls."""

    def __init__(self, connection: SSL.Connection, buffers: SharedBuffers) -> None:
        self._connection = connection
        self._buffers = buffers
        self._unsent = memoryview(b"")

    def read(self, start: int) -> int:
        try:
            return self._connection.recv_into(self._buffers.plain_view[start:])
        except SSL.WantReadError:
            return -1
        except SSL.ZeroReturnError:
            return 0
        except SSL.Error as error:
            raise TlsError(describe(error)) from None

    def drained(self) -> bool:
        return False

    def feed(self, count: int) -> None:
        self._connection.bio_write(bytes(self._buffers.cipher_view[:count]))

    def write(self, view: memoryview) -> int:
        done = 0
        try:
            while done < len(view):
                done += self._connection.send(view[done:])
        except SSL.Error as error:
            raise TlsError(describe(error)) from None
        return done

    def unsent(self) -> memoryview:
        if not self._unsent:
            try:
                self._unsent = memoryview(self._connection.bio_read(2 * _WRITE_MAX))
            except SSL.WantReadError:
                self._unsent = memoryview(b"")
        return self._unsent

    def sent(self, count: int) -> None:
        self._unsent = self._unsent[count:]

    def renew(self) -> bool:
        return True  # no documented call can replace a BIO: its memory stays with the tunnel


class _RawCalls:
    """The same BIOs through the cffi library under pyOpenSSL: no copies, no exceptions."""

    def __init__(self, connection: SSL.Connection, buffers: SharedBuffers) -> None:
        from OpenSSL import _util  # noqa: PLC0415 - private; `calls` falls back without it

        lib: Any = _util.lib
        ffi: Any = _util.ffi
        private: Any = connection
        self._ssl, self._in, self._out = private._ssl, private._into_ssl, private._from_ssl  # noqa: SLF001 - the point
        self._connection = private
        self._lib = lib
        self._explain = _util.exception_from_error_queue
        self._ssl_read, self._ssl_write = lib.SSL_read, lib.SSL_write
        self._get_error, self._ssl_pending = lib.SSL_get_error, lib.SSL_pending
        self._bio_read, self._bio_write = lib.BIO_read, lib.BIO_write
        self._mem_data = lib.BIO_get_mem_data
        self._from_buffer, self._as_buffer = ffi.from_buffer, ffi.buffer
        self._plain = ffi.from_buffer(buffers.plain)
        self._cipher = ffi.from_buffer(buffers.cipher)
        self._scratch = ffi.from_buffer(buffers.scratch)
        self._pointer = ffi.new("char **")

    def read(self, start: int) -> int:
        count: int = self._ssl_read(self._ssl, self._plain + start, PLAIN_SIZE - start)
        if count > 0:
            return count
        code = self._get_error(self._ssl, count)
        if code == _WANT_READ:
            return -1
        if code == _ZERO_RETURN:
            return 0
        raise self._failure()

    def drained(self) -> bool:
        return not self._mem_data(self._in, self._pointer) and not self._ssl_pending(self._ssl)

    def feed(self, count: int) -> None:
        self._bio_write(self._in, self._cipher, count)

    def write(self, view: memoryview) -> int:
        count: int = self._ssl_write(self._ssl, self._from_buffer(view), len(view))
        if count <= 0:
            raise self._failure()
        return count

    def _failure(self) -> TlsError:
        """OpenSSL's error queue as an exception; reading it also clears it."""
        try:
            self._explain(SSL.Error)
        except SSL.Error as error:
            return TlsError(describe(error))
        return TlsError("TLS failure")

    def unsent(self) -> Any:
        count = self._mem_data(self._out, self._pointer)
        return self._as_buffer(self._pointer[0], count) if count > 0 else None

    def sent(self, count: int) -> None:
        scratch = self._scratch
        while count > 0:
            count -= self._bio_read(self._out, scratch, min(count, 2 * _WRITE_MAX))

    def renew(self) -> bool:
        """A memory BIO never shrinks, so others take their place; SSL_set_bio frees these."""
        pointer = self._pointer
        if self._mem_data(self._in, pointer) or self._mem_data(self._out, pointer):
            return False
        lib = self._lib
        self._in, self._out = lib.BIO_new(lib.BIO_s_mem()), lib.BIO_new(lib.BIO_s_mem())
        lib.SSL_set_bio(self._ssl, self._in, self._out)
        self._connection._into_ssl, self._connection._from_ssl = self._in, self._out  # noqa: SLF001 - the point
        return True


def calls(connection: SSL.Connection, buffers: SharedBuffers, *, raw: bool = True) -> _Calls:
    """The raw calls where this pyOpenSSL has them, else the public ones."""
    if raw:
        try:
            return _RawCalls(connection, buffers)
        except (ImportError, AttributeError):
            pass
    return _PublicCalls(connection, buffers)


class TlsTransport:
    """TLS of one established connection on its non-blocking socket."""

    __slots__ = (
        "_batched",
        "_buffers",
        "_calls",
        "_connection",
        "_drained",
        "_grown",
        "blocked",
        "sock",
    )

    def __init__(
        self,
        sock: socket.socket,
        connection: SSL.Connection,
        buffers: SharedBuffers,
        *,
        raw: bool = True,
    ) -> None:
        self.sock = sock
        self.blocked = False
        self._connection = connection
        self._buffers = buffers
        self._calls = calls(connection, buffers, raw=raw)
        self._drained = False
        # The BIOs have grown, and they had a large batch since the last `give_back`.
        self._grown = self._batched = False

    def fill(self) -> tuple[int, Fill]:
        """Decrypt into the shared plain buffer from its start; how many bytes, and why not more.

        TlsError if the peer's TLS broke, OSError if the connection did.
        """
        read = self._calls.read
        end = 0
        while True:
            count = read(end)
            while count > 0:
                end += count
                if PLAIN_SIZE - end < _RECORD:
                    return end, Fill.MORE
                # A short record is mostly the last one, and a read that fails is the dearest.
                count = -1 if count < _RECORD and self._calls.drained() else read(end)
            if count == 0:
                return end, Fill.EOF
            if self._drained:
                self._drained = False
                return end, Fill.DRAINED
            received = self._receive()
            if received == 0:
                return end, Fill.EOF
            if received < 0:
                return end, Fill.DRAINED

    def _receive(self) -> int:
        """One recv(2) into the read BIO; a short one means the socket is drained now."""
        try:
            received = self.sock.recv_into(self._buffers.cipher)
        except BlockingIOError:
            return -1
        if received:
            self._drained = received < _CIPHER_SIZE
            if received > _LARGE:
                self._batched = True
            self._calls.feed(received)
        return received

    def send(self, view: memoryview) -> int:
        """Encrypt and send a batch of `view`; how much of it was taken, 0 while blocked."""
        if self.blocked and not self.push():
            return 0
        taken = self._calls.write(view[:_WRITE_MAX])
        if taken > _LARGE:
            self._batched = True
        self.push()
        return taken

    def push(self) -> bool:
        """Give ciphertext to the socket; False, and `blocked`, while it takes no more."""
        unsent = self._calls.unsent()
        whole = True
        if unsent:
            try:
                count = self.sock.send(unsent)
            except BlockingIOError:
                self.blocked = True
                return False
            whole = count == len(unsent)
            unsent = None
            self._calls.sent(count)
        self.blocked = not whole
        return whole

    @property
    def kept(self) -> int:
        """How many bytes of ciphertext the socket has not taken."""
        unsent = self._calls.unsent()
        return len(unsent) if unsent else 0

    def give_back(self) -> None:
        """Called now and then: release what the BIOs grew to, if they were idle since last time."""
        if self._batched:
            self._batched, self._grown = False, True
        elif self._grown:
            self._grown = not self._calls.renew()

    def shutdown(self) -> None:
        """Tell the peer that no more comes (close_notify), if it can be told without waiting."""
        try:
            self._connection.shutdown()
            self.push()
        except (SSL.Error, OSError):
            return

    def __repr__(self) -> str:
        return f"<TlsTransport fd {self.sock.fileno()}{' blocked' if self.blocked else ''}>"
