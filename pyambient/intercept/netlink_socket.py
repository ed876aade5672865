"""A netlink socket in a pod, with just what it takes to change one thing or to read a list."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple, Self

from pyambient.netns import Netns

_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_DUMP_INTR: Final = 0x10
_ERROR, _DONE = 2, 3
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr
_TYPE_MASK: Final = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_BUFFER: Final = 64 << 10
_MOST_MESSAGES: Final = 1 << 20
_MOST_ATTEMPTS: Final = 10

Attributes = dict[int, bytes]


class Message(NamedTuple):
    """What is to be sent; `body` is a multiple of 4 bytes long."""

    kind: int
    flags: int
    body: bytes


class NetlinkSocket:
    """A socket of one netlink family; close it when done. OSError is the kernel's word."""

    def __init__(self, netns: Netns | None, protocol: int) -> None:
        """Without a `netns`, in that of the calling thread: to enter one takes privileges."""
        make = socket.socket if netns is None else netns.socket
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = make(socket.AF_NETLINK, kind, protocol)
        self._sequence = 0

    def change(self, kind: int, flags: int, body: bytes) -> None:
        self._send(kind, flags | _ACK, body)
        for _ in self._answers():
            pass

    def transact(self, messages: Sequence[Message]) -> None:
        """Changes of which all are made or none; the first and the last are just around them."""
        first, *inner, last = messages
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        acknowledged = [message._replace(flags=message.flags | _ACK) for message in inner]
        self._socket.send(b"".join(map(self._packed, (first, *acknowledged, last))))
        for _ in inner:
            for _ in self._answers():
                pass

    def get(self, kind: int, body: bytes) -> bytes | None:
        """The one message that answers a question; None if it is not there."""
        self._send(kind, 0, body)
        return next((answer for _, answer in self._answers()), None)

    def each(self, kind: int, body: bytes) -> Iterator[bytes]:
        """A list as the kernel tells it, of which nobody has to have all."""
        self._send(kind, _DUMP, body)
        for _, answer in self._answers():
            yield answer

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """All of a list, a message each; read anew where it changed while the kernel told it."""
        for _ in range(_MOST_ATTEMPTS):
            self._send(kind, _DUMP, body)
            answers = list(self._answers())
            if not any(flags & _DUMP_INTR for flags, _ in answers):
                return [answer for _, answer in answers]
        raise OSError(errno.EINTR, os.strerror(errno.EINTR), "netlink")

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd {self._socket.fileno()}>"

    def _send(self, kind: int, flags: int, body: bytes) -> None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._socket.send(self._packed(Message(kind, flags, body)))

    def _packed(self, message: Message) -> bytes:
        kind, flags, body = message
        size = _HEADER.size + len(body)
        return _HEADER.pack(size, kind, _REQUEST | flags, self._sequence, 0) + body

    def _answers(self) -> Iterator[tuple[int, bytes]]:
        """The flags and body of what answers the last message, up to its end."""
        for _ in range(_MOST_MESSAGES):
            received = self._socket.recv(_BUFFER)
            for kind, flags, sequence, body in _messages(received):
                if sequence != self._sequence:
                    continue  # of a list that was given up
                if kind in (_ERROR, _DONE):
                    _raise_unless_zero(body)
                    return
                yield flags, body


def packed(attributes: Mapping[int, bytes | None]) -> bytes:
    """As they stand in a message; one whose value is None is left out."""
    packed = b""
    for kind, value in attributes.items():
        if value is not None:
            size = _ATTRIBUTE.size + len(value)
            packed += _ATTRIBUTE.pack(size, kind) + value + bytes(-size & 3)
    return packed


def attributes_of(data: bytes) -> Attributes:
    return dict(each_attribute(data))


def each_attribute(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Where one may be there several times."""
    start = 0
    while start + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, start)
        if size < _ATTRIBUTE.size:
            break
        yield kind & _TYPE_MASK, data[start + _ATTRIBUTE.size : start + size]
        start += (size + 3) & ~3


def _messages(received: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and body of each message in a datagram."""
    start = 0
    while start + _HEADER.size <= len(received):
        size, kind, flags, sequence, _ = _HEADER.unpack_from(received, start)
        if size < _HEADER.size:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG), "netlink")
        yield kind, flags, sequence, received[start + _HEADER.size : start + size]
        start += (size + 3) & ~3


def _raise_unless_zero(body: bytes) -> None:
    (negative,) = struct.unpack_from("=i", body)
    if negative < 0:
        raise OSError(-negative, os.strerror(-negative))
