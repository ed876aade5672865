"""What conntrack knows of a pod's flows, in ctnetlink's own words (linux/nfnetlink_conntrack.h).

The proxy asks once per DNS query, so this is one small message each way on one open socket, and
pyroute2 is not needed. Kernels answer within send(2): an answer that is not there does not come.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple, Self

from pyambient.model.address import SocketAddress
from pyambient.netns import Netns

_NETLINK_NETFILTER: Final = 12
_NEW, _GET, _DELETE = 0x100, 0x101, 0x102  # NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLA_F_NESTED: Final = 0x8000
_NLA_TYPE_MASK: Final = 0x3FFF
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY = 1, 2
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
# CTA_IP_*: of the source and of the destination.
_CTA_IP: Final[dict[int, tuple[int, int]]] = {socket.AF_INET: (1, 2), socket.AF_INET6: (3, 4)}

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr
_FAMILY: Final = struct.Struct("=BBH")  # nfgenmsg
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr
_BUFFER: Final = 1 << 16
_MOST_MESSAGES: Final = 1 << 20

Attributes = dict[int, bytes]


class Flow(NamedTuple):
    """The two ends of a flow, as its packets in one direction name them."""

    source: SocketAddress
    destination: SocketAddress


class Entry(NamedTuple):
    """A tracked flow: what opened it, and what its answers are expected to be."""

    opening: Flow
    answers: Flow


class Conntrack:
    """A ctnetlink socket of a pod (needs CAP_NET_ADMIN there); close it when done.

    Its flows are those of one protocol, UDP unless told.
    """

    def __init__(self, netns: Netns, protocol: int = socket.IPPROTO_UDP) -> None:
        self._socket = netns.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._protocol = bytes((protocol,))
        self._sequence = 0

    def opening(self, answers: Flow) -> Flow | None:
        """What opened the flow whose answers are these; None if there is none.

        OSError where the kernel has no ctnetlink.
        """
        found = self._entry(_CTA_TUPLE_REPLY, answers)
        return found.opening if found else None

    def answers(self, opening: Flow) -> Flow | None:
        """What the answers are expected to be to the flow that this opened; None if there is none.

        OSError where the kernel has no ctnetlink.
        """
        found = self._entry(_CTA_TUPLE_ORIG, opening)
        return found.answers if found else None

    def _entry(self, which: int, flow: Flow) -> Entry | None:
        body = self._tuple(which, flow)
        self._send(_GET, _NLM_F_REQUEST, flow.source.family, body)
        try:
            return next(self._entries(), None)
        except FileNotFoundError:
            return None

    def entries(self, family: int) -> list[Entry]:
        """All flows of one address family."""
        self._send(_GET, _NLM_F_REQUEST | _NLM_F_DUMP, family, b"")
        return list(self._entries())

    def forget(self, opening: Flow) -> None:
        """Delete the flow that this opened; one that is gone is no error."""
        body = self._tuple(_CTA_TUPLE_ORIG, opening)
        self._send(_DELETE, _NLM_F_REQUEST | _NLM_F_ACK, opening.source.family, body)
        with contextlib.suppress(FileNotFoundError):
            list(self._entries())

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Conntrack fd {self._socket.fileno()}>"

    def _send(self, kind: int, flags: int, family: int, body: bytes) -> None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        size = _HEADER.size + _FAMILY.size + len(body)
        header = _HEADER.pack(size, kind, flags, self._sequence, 0)
        self._socket.send(header + _FAMILY.pack(family, 0, 0) + body)

    def _entries(self) -> Iterator[Entry]:
        """The flows in what answers the last message; OSError is what the kernel says."""
        for _ in range(_MOST_MESSAGES):
            try:
                received = self._socket.recv(_BUFFER)
            except BlockingIOError:
                return
            for kind, sequence, body in _messages(received):
                if sequence != self._sequence:
                    continue  # of a dump that was given up
                if kind == _NLMSG_ERROR:
                    _raise_unless_ack(body)
                    return
                if kind == _NLMSG_DONE:
                    return
                entry = self._read(body)
                if entry is not None:
                    yield entry

    def _read(self, body: bytes) -> Entry | None:
        """None if it is of another protocol."""
        family, attributes = body[0], _attributes(body[_FAMILY.size :])
        opening, answers = (
            self._flow(family, attributes[which]) for which in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY)
        )
        return Entry(opening, answers) if opening and answers else None

    def _flow(self, family: int, raw: bytes) -> Flow | None:
        ends = _attributes(raw)
        protocol, addresses = _attributes(ends[_CTA_TUPLE_PROTO]), _attributes(ends[_CTA_TUPLE_IP])
        if family not in _CTA_IP or protocol[_CTA_PROTO_NUM] != self._protocol:
            return None
        ports = (protocol[_CTA_PROTO_SRC_PORT], protocol[_CTA_PROTO_DST_PORT])
        source, destination = (
            SocketAddress(socket.inet_ntop(family, addresses[kind]), int.from_bytes(port))
            for kind, port in zip(_CTA_IP[family], ports, strict=True)
        )
        return Flow(source, destination)

    def _tuple(self, kind: int, flow: Flow) -> bytes:
        """A CTA_TUPLE_*: the flow's addresses, the protocol and the ports."""
        family = flow.source.family
        addresses = b"".join(
            _attribute(which, socket.inet_pton(family, end.ip.partition("%")[0]))
            for which, end in zip(_CTA_IP[family], flow, strict=True)
        )
        protocol = (
            _attribute(_CTA_PROTO_NUM, self._protocol)
            + _attribute(_CTA_PROTO_SRC_PORT, flow.source.port.to_bytes(2))
            + _attribute(_CTA_PROTO_DST_PORT, flow.destination.port.to_bytes(2))
        )
        inner = _nested(_CTA_TUPLE_IP, addresses) + _nested(_CTA_TUPLE_PROTO, protocol)
        return _nested(kind, inner)


def _raise_unless_ack(body: bytes) -> None:
    (negative,) = struct.unpack_from("=i", body)
    if negative:
        raise OSError(-negative, os.strerror(-negative), "ctnetlink")


def _messages(received: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Type, sequence number and body of each netlink message in a datagram."""
    while len(received) >= _HEADER.size:
        size, kind, _, sequence, _ = _HEADER.unpack_from(received)
        if not _HEADER.size <= size <= len(received):
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG), "ctnetlink")
        yield kind, sequence, received[_HEADER.size : size]
        received = received[_padded(size) :]


def _attributes(raw: bytes) -> Attributes:
    found: Attributes = {}
    while len(raw) >= _ATTRIBUTE.size:
        size, kind = _ATTRIBUTE.unpack_from(raw)
        if size < _ATTRIBUTE.size:
            break
        found[kind & _NLA_TYPE_MASK] = raw[_ATTRIBUTE.size : size]
        raw = raw[_padded(size) :]
    return found


def _nested(kind: int, inner: bytes) -> bytes:
    return _attribute(kind | _NLA_F_NESTED, inner)


def _attribute(kind: int, value: bytes) -> bytes:
    size = _ATTRIBUTE.size + len(value)
    return (_ATTRIBUTE.pack(size, kind) + value).ljust(_padded(size), b"\0")


def _padded(size: int) -> int:
    return (size + 3) & ~3
